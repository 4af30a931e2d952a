"""A grouped sketch is what a plain sketch of each part says, put together; nothing between two groups is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_fx.errors import CalibrationError, OptionError, StorageError
from lowrank_fx.grouped_sketch import GroupedSketch, load_sketch, make_sketch, merge_sketches
from lowrank_fx.sketch import FrequentDirections


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + 2


def sketch_of(given: Tensor, groups: int, size: int | None = None) -> GroupedSketch:
    sketch = GroupedSketch(given.shape[1], groups, size)
    for block in torch.split(given, 7):
        sketch.update(block)
    return sketch


def applied(z: Tensor, given: Tensor, groups: int) -> Tensor:
    """The grouped layer Z on rows: each block of Z on its own part."""
    parts = zip(z.chunk(groups), given.chunk(groups, 1), strict=True)
    return torch.cat([own @ block.t() for block, own in parts], 1)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 4), width=st.integers(1, 5), block=st.integers(1, 4), count=st.integers(1, 40),
    size=st.none() | st.integers(1, 4), seed=st.integers(0, 99), centered=st.booleans(),
)  # fmt: skip
def test_mean_and_certificate_hold_for_the_rows_themselves(
    groups: int, width: int, block: int, count: int, size: int | None, seed: int, centered: bool
) -> None:
    given_rows = rows(count, groups * width, seed)
    sketch = sketch_of(given_rows, groups, size)
    assert (sketch.rows, sketch.exact) == (count, size is None or size >= width)
    torch.testing.assert_close(sketch.mean, given_rows.mean(0), rtol=1e-12, atol=1e-12)
    z = rows(groups * block, width, seed + 1)
    seen = given_rows - given_rows.mean(0) if centered else given_rows
    energy = float(applied(z, seen, groups).square().sum())
    least, most = sketch.certificate(z, centered)
    rounding = 1e-9 * float(z.square().sum()) * float(given_rows.square().sum())
    assert least - rounding <= energy <= most + rounding
    if sketch.exact:
        assert most - least <= rounding
    total = float((given_rows - given_rows.mean(0)).square().sum())
    assert sketch.squared_norm == pytest.approx(total, rel=1e-9, abs=rounding)


def test_every_part_is_the_sketch_of_its_own_columns() -> None:
    given_rows = rows(50, 12).float()
    for size in (None, 2):
        sketch = sketch_of(given_rows, 3, size)
        for part, own in zip(sketch.parts, given_rows.chunk(3, 1), strict=True):
            alone = FrequentDirections(4, size)
            for block in torch.split(own, 7):
                alone.update(block)
            assert torch.equal(part.gram(), alone.gram())
            assert (part.delta, part.rows) == (alone.delta, 50)


def test_groups_of_very_different_size_are_each_seen() -> None:
    given_rows = rows(50, 4) * torch.tensor([1.0, 1.0, 1e-30, 1e-30], dtype=torch.float64)
    small = sketch_of(given_rows.float(), 2).parts[1]
    own = given_rows[:, 2:]
    own = own - own.mean(0)
    # Float32 rows and products: 50 terms.
    torch.testing.assert_close(small.gram() * 1e60, own.t() @ own * 1e60, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [None, 3])
def test_merging_is_seeing_all_rows(size: int | None) -> None:
    a, b = rows(40, 10, 1), rows(30, 10, 2)
    merged = sketch_of(a, 2, size)
    merge_sketches(merged, sketch_of(b, 2, size))
    both = torch.cat([a, b])
    assert merged.rows == 70
    torch.testing.assert_close(merged.mean, both.mean(0), rtol=1e-12, atol=1e-12)
    z = rows(4, 5, 3)
    least, most = merged.certificate(z)
    energy = float(applied(z, both - both.mean(0), 2).square().sum())
    assert least * (1 - 1e-9) <= energy <= most * (1 + 1e-9)


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_state_goes_through_a_dictionary_and_a_copy_is_independent(size: int | None, groups: int) -> None:
    sketch = make_sketch(10, groups, size)
    sketch.update(rows(25, 10))
    again, copy = load_sketch(sketch.state_dict()), sketch.copy()
    assert type(again) is type(copy) is type(sketch)
    sketch.update(rows(5, 10, 1))
    assert (again.rows, copy.rows, sketch.rows) == (25, 25, 30)
    for other in (again, copy):
        other.update(rows(5, 10, 1))
        assert torch.equal(other.mean, sketch.mean)
        for part, wanted in zip(other.parts, sketch.parts, strict=True):
            assert torch.equal(part.gram(), wanted.gram())
    assert again.nbytes == sketch.nbytes == sum(part.nbytes for part in sketch.parts)


def test_a_bad_value_changes_no_group() -> None:
    sketch = sketch_of(rows(9, 6), 3)
    before = sketch.state_dict()
    bad = rows(4, 6)
    bad[1, 5] = torch.inf
    with pytest.raises(CalibrationError, match="row 1 of 4 holds inf in column 5"):
        sketch.update(bad)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sketch.state_dict().items())
    sketch.update(torch.zeros(0, 6))
    assert sketch.rows == 9


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="groups must divide dim"):
        GroupedSketch(10, 3)
    with pytest.raises(OptionError, match="groups must divide dim"):
        GroupedSketch(10, 0)
    sketch = sketch_of(rows(9, 6), 3)
    with pytest.raises(CalibrationError, match=r"rows of shape \(2, 5\); it takes floating rows of shape \(n, 6\)"):
        sketch.update(torch.zeros(2, 5))
    with pytest.raises(CalibrationError, match="3 groups cannot bound Z"):
        sketch.certificate(torch.zeros(4, 2))
    for other in (make_sketch(6), make_sketch(6, 2), make_sketch(9, 3)):
        with pytest.raises(CalibrationError, match="cannot merge"):
            merge_sketches(sketch, other)
    with pytest.raises(CalibrationError, match="dim, groups and size must be the same"):
        sketch.merge(GroupedSketch(6, 3, 1))
    state = sketch.state_dict()
    del state["1.mean"]
    with pytest.raises(StorageError, match="not the state of a FrequentDirections"):
        load_sketch(state)
    state = sketch.state_dict() | make_sketch(6, 3).state_dict()
    state["0.geometry"] = torch.tensor([2, 0, 5])
    with pytest.raises(StorageError, match="not of one dim, size and number of rows"):
        load_sketch(state)
    with pytest.raises(StorageError, match="not the state of a GroupedSketch"):
        GroupedSketch.from_state_dict({})
    assert repr(sketch) == "GroupedSketch(dim=6, groups=3, exact, rows=9)"
