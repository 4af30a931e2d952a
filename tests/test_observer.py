"""Which rows an observer takes, how groups lie in them, and how large a tap's sketch may be."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lowrank_fx import observer as observer_room
from lowrank_fx.errors import CalibrationError
from lowrank_fx.grouped_sketch import GroupedSketch, make_sketch
from lowrank_fx.observer import Recorder, TapObserver, sketch_sizes
from lowrank_fx.patches import Patch
from lowrank_fx.sites import Tap


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def observe(tap: Tap, activation: Tensor, mask: Tensor | None = None) -> TapObserver:
    """An observer of ``tap`` that has seen one activation."""
    recorder = Recorder(0)
    recorder.start(0, mask)
    observer = TapObserver(tap, make_sketch(tap.width, tap.groups), 10**6, recorder)
    observer.layers = "some layer"
    observer(activation)
    return observer


def assert_seen(observer: TapObserver, rows: Tensor) -> None:
    """The sketch is that of ``rows``, and of nothing between two groups."""
    sketch = observer.sketch
    assert sketch.rows == rows.shape[0]
    # Float64 rows are summed in float64: at most 100 terms of size one.
    torch.testing.assert_close(sketch.mean, rows.mean(0), rtol=0, atol=1e-12)
    centred = (rows - rows.mean(0)).chunk(observer.tap.groups, 1)
    for part, own in zip(sketch.parts, centred, strict=True):
        torch.testing.assert_close(part.gram(), own.t() @ own, rtol=0, atol=1e-10)


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (3, 4), (3, 5, 4), (2, 3, 2, 4), (2, 1, 3, 2, 4), (0, 4), (2, 0, 4)])
def test_a_linear_layer_s_rows_lie_along_the_last_dimension(shape: tuple[int, ...]) -> None:
    x = values(*shape)
    observer = observe(Tap("x", "x", 4), x)
    assert observer.first_rows == x.numel() // 4 == observer.sketch.rows
    if x.numel():
        assert_seen(observer, x.reshape(-1, 4))


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 5, 4), (2, 2, 3, 5, 4), (3, 0, 4)])
def test_the_groups_of_a_batch_of_matrices_lie_beside_each_other(shape: tuple[int, ...]) -> None:
    x = values(*shape)
    observer = observe(Tap("x[g3]", "x", 12, groups=3), x)
    assert isinstance(observer.sketch, GroupedSketch)
    assert observer.first_rows == x.numel() // 12 == observer.sketch.rows
    if x.numel():
        flat = x.reshape(-1, *shape[-3:])
        assert_seen(observer, torch.cat([torch.cat([each[group] for each in flat]) for group in range(3)], 1))


@pytest.mark.parametrize("shape", [(5, 4), (2, 1, 5, 4)])
def test_rows_without_groups_meet_the_matrix_of_each(shape: tuple[int, ...]) -> None:
    x = values(*shape)
    observer = observe(Tap("x[g3]", "x", 12, groups=3), x)
    assert_seen(observer, x.reshape(-1, 4).repeat(1, 3))


def test_the_patches_of_a_grouped_convolution_divide_by_channels() -> None:
    x, patch = values(2, 4, 6, 5), Patch((3, 2), (2, 1), ((1, 1), (0, 0)), (1, 1))
    observer = observe(Tap("x", "x", 24, patch, groups=2), x)
    halves = [F.unfold(half, (3, 2), 1, (1, 0), (2, 1)).transpose(1, 2).flatten(0, 1) for half in x.chunk(2, 1)]
    assert_seen(observer, torch.cat(halves, 1))
    assert observer.first_rows == halves[0].shape[0]


def test_patches_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer_room, "BLOCK_ROWS", 7)
    x, patch = values(2, 4, 6, 5), Patch((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    seen: list[Tensor] = []
    sketch = make_sketch(36, 1, None, x.device)
    monkeypatch.setattr(sketch, "update", seen.append)
    TapObserver(Tap("x", "x", 36, patch), sketch, 8, Recorder(0))(x)
    assert [len(block) for block in seen] == [7] * 8 + [4]
    assert torch.equal(torch.cat(seen), F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1))


def test_no_images_at_all_are_no_rows() -> None:
    observer = observe(Tap("x", "x", 12, Patch((3,), (1,), ((1, 1),), (1,))), values(0, 4, 6))
    assert (observer.first_rows, observer.sketch.rows) == (0, 0)


def test_a_bad_value_names_the_batch_the_layers_and_its_place_in_the_whole_row() -> None:
    x = values(3, 5, 4)
    x[2, 1, 3] = torch.nan
    with pytest.raises(CalibrationError, match="batch 0: the input of some layer: row 1 of 5 holds nan in column 11"):
        observe(Tap("x[g3]", "x", 12, groups=3), x)


# ---- masks and sampling ----------------------------------------------------------------------------------------------

MASK = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("tap", "shape", "masked"),
    [
        (Tap("x", "x", 4), (2, 3, 4), True),
        (Tap("x", "x", 4), (6, 4), True),
        (Tap("x", "x", 4), (2, 3, 2, 4), False),  # several rows per token: which are padding is not known
        (Tap("x", "x", 4), (3, 2, 4), False),
        (Tap("x", "x", 12), (2, 3, 12), True),
        (Tap("x", "x", 8, groups=2), (2, 2, 3, 4), True),  # heads of tokens
        (Tap("x", "x", 8, groups=2), (2, 6, 4), True),  # flattened tokens, for each of two groups
        (Tap("x", "x", 8, groups=2), (2, 3, 4), False),  # groups that only look like batch entries
        (Tap("x", "x", 12, Patch((3,), (1,), ((1, 1),), (1,))), (2, 4, 3), False),
    ],
)
def test_padding_is_left_out_where_rows_are_tokens(tap: Tap, shape: tuple[int, ...], masked: bool) -> None:
    x = values(*shape)
    whole = observe(tap, x)
    observer = observe(tap, x, MASK)
    assert observer.first_rows == whole.first_rows
    assert observer.sketch.rows == (3 if masked else whole.sketch.rows)


def test_the_masked_rows_of_groups_are_those_of_real_tokens() -> None:
    x = values(2, 2, 3, 4)
    real = x.transpose(1, 2)[MASK].flatten(1)
    assert_seen(observe(Tap("x[g2]", "x", 8, groups=2), x, MASK), real)


def test_every_tap_draws_rows_of_its_own() -> None:
    recorder = Recorder(0)
    recorder.start(0, None)
    observers = [TapObserver(Tap(name, "x", 24), make_sketch(24), 6, recorder) for name in ("x", "y")]
    total = 40 * observer_room.MIN_ROWS
    chosen = [observer._sample(total, None) for observer in observers]
    assert all(rows.numel() == 10 * observer_room.MIN_ROWS == len(set(rows.tolist())) for rows in chosen)
    assert not torch.equal(*chosen)


def test_only_real_rows_are_sampled() -> None:
    observer = TapObserver(Tap("x", "x", 24), make_sketch(24), 6, Recorder(0))
    mask = torch.arange(8 * observer_room.MIN_ROWS) % 2 == 0
    rows = observer._sample(mask.numel(), mask)
    assert rows.numel() == 2 * observer_room.MIN_ROWS
    assert bool(mask[rows].all())


# ---- sketch sizes ----------------------------------------------------------------------------------------------------


def taps(*widths: int) -> list[Tap]:
    return [Tap(f"t{position}", f"t{position}", width) for position, width in enumerate(widths)]


def state_bytes(widths: Sequence[int], sizes: dict[str, int | None]) -> int:
    chosen = zip(widths, sizes.values(), strict=True)
    return sum(8 * width**2 if size is None else 16 * width * size for width, size in chosen)


def test_all_taps_are_exact_while_they_fit() -> None:
    widths = (400, 300, 1000)
    memory = 8 * sum(width**2 for width in widths)
    assert set(sketch_sizes(taps(*widths), None, memory).values()) == {None}
    # One byte less: the widest is sketched, with all that the exact ones leave (500 rows would be as large as exact).
    assert sketch_sizes(taps(*widths), None, memory - 1) == {"t0": None, "t1": None, "t2": 499}
    assert sketch_sizes([], None, 1) == {}


@settings(deadline=None)
@given(st.lists(st.integers(1, 12000), max_size=8), st.integers(1, 1 << 30))
def test_the_widest_taps_are_sketched_first_and_all_fit_if_they_can(widths: list[int], memory: int) -> None:
    sizes = sketch_sizes(taps(*widths), None, memory)
    paired = list(zip(widths, sizes.values(), strict=True))
    exact = [width for width, size in paired if size is None]
    sketched = {width: size for width, size in paired if size is not None}
    assert all(256 <= size < width / 2 for width, size in sketched.items())
    wide = [width for width in exact if width > 512]
    assert not sketched or not wide or min(sketched) > max(wide)
    # Taps of one width are sketched alike, or a weight that is applied to two of them could not pool them.
    assert all(size == sketched.get(width) for width, size in paired)
    least = sum(min(8 * width**2, 16 * width * 256) for width in widths)
    assert state_bytes(widths, sizes) <= max(memory, least)
    # No more is sketched than has to be: with the narrowest of them exact, even the least sizes would not fit.
    if sketched:
        back = min(sketched)
        others = sum(16 * width * 256 for width, size in paired if size is not None and width != back)
        assert 8 * back**2 * widths.count(back) + others + 8 * sum(width**2 for width in exact) > memory


def test_a_least_size_that_takes_more_than_its_share_leaves_less_to_the_others() -> None:
    # 11008 needs 16 x 11008 x 256 bytes = 43 MiB of the 60; the rest is for the 3000.
    assert sketch_sizes(taps(11008, 3000), None, 60 << 20) == {"t0": 256, "t1": 371}


def test_sizes_have_a_floor_and_can_be_forced() -> None:
    assert sketch_sizes(taps(5000, 512, 513), None, 1) == {"t0": 256, "t1": None, "t2": 256}
    assert sketch_sizes(taps(5000, 100), 32, 1 << 40) == {"t0": 32, "t1": 32}


def test_groups_count_as_so_many_taps_of_their_own_width() -> None:
    grouped = Tap("g", "g", 8 * 1000, groups=8)
    exact = 8 * 8 * 1000**2
    assert sketch_sizes([grouped], None, exact) == {"g": None}
    assert sketch_sizes([grouped], None, exact - 1) == {"g": 499}
    # A group no wider than twice the least size stays exact, whatever the row's own length.
    assert sketch_sizes([Tap("g", "g", 100 * 512, groups=100)], None, 1) == {"g": None}
    assert make_sketch(8000, 8, 499).nbytes < 0.6 * make_sketch(8000, 8).nbytes
