"""Rows that wait in exact mode: whoever reads, saves or merges, the sums are right, and later bits the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lowrank_fx.errors import StorageError
from lowrank_fx.sketch import FrequentDirections

DIM = 300
"""More than one panel of columns, and more than the rows that wait in any case."""


def blocks(sizes: Sequence[int], dim: int = DIM, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows with a mean, in columns of falling length, a block of each size."""
    generator = torch.Generator().manual_seed(len(sizes))
    rows = torch.randn(sum(sizes), dim, generator=generator, dtype=torch.float64)
    scaled = rows * torch.logspace(0, -2, dim, dtype=torch.float64) + 2
    return list(torch.split(scaled.to(dtype), list(sizes)))


def fed(sketch: FrequentDirections, rows: Sequence[Tensor]) -> FrequentDirections:
    for block in rows:
        sketch.update(block)
    return sketch


def same(sketch: FrequentDirections, other: FrequentDirections) -> bool:
    ours, theirs = sketch.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(part, theirs[name]) for name, part in ours.items())


def check(sketch: FrequentDirections, rows: Sequence[Tensor]) -> None:
    """Number, mean, energy, Gram matrix and bound against float64."""
    whole = torch.cat([block.double() for block in rows])
    centered = whole - whole.mean(0)
    gram = centered.T @ centered
    energy = float(gram.trace())
    assert sketch.rows == whole.shape[0]
    # The mean and the energy are summed in float64; 1e-12 is thousands of its roundings.
    torch.testing.assert_close(sketch.mean, whole.mean(0), rtol=1e-12, atol=1e-13)
    assert sketch.squared_norm == pytest.approx(energy, rel=1e-12)
    read = sketch.gram()
    assert torch.equal(read, read.T)
    error = float(torch.linalg.matrix_norm(read - gram))
    # Rounding to float32 is 6e-8 of the energy per operation at worst and averages out: measured 2e-8.
    assert error <= 1e-7 * energy
    assert error <= sketch.rho <= 1e-5 * energy
    for centered_too, truth in ((True, centered), (False, whole)):
        z = torch.ones(1, whole.shape[1], dtype=torch.float64)
        lower, upper = sketch.certificate(z, centered_too)
        assert lower <= float((truth @ z.T).square().sum()) <= upper


READERS: dict[str, Callable[[FrequentDirections], object]] = {
    "gram": lambda sketch: sketch.gram(),
    "mean": lambda sketch: sketch.mean,
    "energy": lambda sketch: sketch.squared_norm,
    "rho": lambda sketch: sketch.rho,
    "rows": lambda sketch: sketch.rows,
    "state": lambda sketch: sketch.state_dict(),
    "certificate": lambda sketch: sketch.certificate(torch.ones(1, DIM)),
    "matrix": lambda sketch: sketch.matrix(centered=False),
}


@pytest.mark.parametrize("reader", READERS)
def test_who_reads_and_when_changes_no_bit(reader: str) -> None:
    rows = blocks([100, 130, 90, 7, 500, 20, 110, 110, 3])
    silent, read = FrequentDirections(DIM), FrequentDirections(DIM)
    for number, block in enumerate(rows):
        silent.update(block)
        read.update(block)
        READERS[reader](read)
        if number % 2:
            READERS[reader](read)
    assert same(read, silent)
    check(read, rows)
    assert torch.equal(read.gram(), silent.gram())
    assert (read.rho, read.squared_norm) == (silent.rho, silent.squared_norm)


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_stream_that_was_saved_anywhere_goes_on_bit_by_bit(stop: int) -> None:
    rows = blocks([100, 130, 90, 7, 500, 20, 110, 110, 3])
    whole = fed(FrequentDirections(DIM), rows)
    first = fed(FrequentDirections(DIM), rows[:stop])
    state = {name: part.clone() for name, part in first.state_dict().items()}
    resumed = fed(FrequentDirections.from_state_dict(state), rows[stop:])
    assert same(resumed, whole)
    assert torch.equal(resumed.gram(), whole.gram())
    check(first, rows[:stop])


def test_every_prefix_reads_right() -> None:
    rows = blocks([100] * 5 + [3] * 4)
    sketch = FrequentDirections(DIM)
    for number, block in enumerate(rows, 1):
        sketch.update(block)
        check(sketch, rows[:number])


def test_rows_of_both_dtypes_are_multiplied_each_in_its_own() -> None:
    single, double = blocks([90, 90, 90], 40), blocks([90, 90, 90], 40, torch.float64)
    mixed = [block for pair in zip(single, double, strict=True) for block in pair]
    sketch = fed(FrequentDirections(40), mixed)
    check(sketch, mixed)
    # A block of few float64 rows alone is exact to float64, waiting or not: 300 roundings of 1.1e-16 at worst.
    alone = fed(FrequentDirections(40), double)
    whole = torch.cat(double)
    centered = whole - whole.mean(0)
    energy = float(centered.square().sum())
    assert float(torch.linalg.matrix_norm(alone.gram() - centered.T @ centered)) <= 1e-13 * energy


@pytest.mark.parametrize("after", [0, 60])
def test_merged_rows_wait_no_less(after: int) -> None:
    rows = blocks([100, 100, 100, 80, 60])
    ours, theirs = fed(FrequentDirections(DIM), rows[:2]), fed(FrequentDirections(DIM), rows[2:4])
    before = theirs.state_dict()
    ours.gram()
    ours.merge(theirs)
    assert all(torch.equal(part, before[name]) for name, part in theirs.state_dict().items())
    seen = rows[:4]
    if after:
        ours.update(rows[4])
        seen = rows
    check(ours, seen)


@pytest.mark.parametrize(("dim", "most"), [(64, 256), (384, 384), (2048, 1024)])
def test_waiting_rows_are_bounded_and_counted(dim: int, most: int) -> None:
    sketch = FrequentDirections(dim)
    empty = sketch.nbytes
    for _ in range(12):
        sketch.update(torch.ones(100, dim))
    assert sketch.nbytes == empty + 4 * most * dim
    assert sketch.state_dict()["buffer"].shape[0] <= most
    # Rows that are many in one call never wait.
    large = FrequentDirections(dim)
    large.update(torch.ones(most, dim))
    assert large.nbytes == empty


def test_few_rows_join_as_one_block() -> None:
    """What makes small batches fast: the matrix is not touched until enough rows have come."""
    sketch = fed(FrequentDirections(DIM), blocks([100, 100]))
    assert not bool(sketch.state_dict()["gram"].any())
    sketch.update(blocks([120])[0])
    assert bool(sketch.state_dict()["gram"].any())
    assert sketch.state_dict()["buffer"].shape == (120, DIM)


def test_a_state_with_waiting_rows_that_cannot_be_is_refused() -> None:
    state = fed(FrequentDirections(DIM), blocks([20])).state_dict()
    for wrong in (torch.zeros(301, DIM), torch.zeros(20, DIM + 1), torch.zeros(DIM), torch.zeros(2, DIM).int()):
        with pytest.raises(StorageError, match="wait, beside a dim of 300"):
            FrequentDirections.from_state_dict(state | {"buffer": wrong})
