"""Patches of a convolution's input, in one to three dimensions, against ``unfold`` and the convolution itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_fx.patches import Patch


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SMALL = st.integers(1, 3)
SIDES = st.tuples(st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=150, deadline=None)
@given(
    kernel=st.tuples(SMALL, SMALL), stride=st.tuples(SMALL, SMALL), padding=SIDES, dilation=st.tuples(SMALL, SMALL),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), batch=SMALL, channels=SMALL, seed=st.integers(0, 99),
)  # fmt: skip
def test_patches_are_those_of_unfold(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    size: tuple[int, int], batch: int, channels: int, seed: int,
) -> None:  # fmt: skip
    assume(all(size[a] + 2 * padding[a] > dilation[a] * (kernel[a] - 1) for a in range(2)))
    x = rows(batch, channels, *size, seed=seed)
    patch = Patch(kernel, stride, ((padding[0],) * 2, (padding[1],) * 2), dilation)
    unfolded = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
    height, width = patch.positions(*size)
    assert batch * height * width == unfolded.shape[0] == patch.rows(x)
    assert torch.equal(patch.extract(x, torch.arange(unfolded.shape[0])), unfolded)
    some = torch.randint(unfolded.shape[0], (4,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(patch.extract(x, some), unfolded[some])
    blocks = list(patch.blocks(x, some, 3))
    assert [len(block) for block in blocks] == [3, 1]
    assert torch.equal(torch.cat(blocks), unfolded[some])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), dims=st.integers(1, 3), batch=st.integers(0, 2), channels=SMALL, seed=st.integers(0, 99))
def test_patches_times_the_weight_are_the_convolution(
    data: st.DataObject, dims: int, batch: int, channels: int, seed: int
) -> None:
    kernel, stride, padding, dilation, size = (
        tuple(data.draw(st.lists(numbers, min_size=dims, max_size=dims)))
        for numbers in (SMALL, SMALL, st.integers(0, 2), SMALL, st.integers(1, 6))
    )
    assume(all(size[a] + 2 * padding[a] > dilation[a] * (kernel[a] - 1) for a in range(dims)))
    x, weight = rows(batch, channels, *size, seed=seed).double(), rows(4, channels, *kernel).double()
    wanted = (F.conv1d, F.conv2d, F.conv3d)[dims - 1](x, weight, None, stride, padding, dilation)
    patch = Patch(kernel, stride, tuple((amount, amount) for amount in padding), dilation)
    assert wanted.shape == (batch, 4, *patch.positions(*size))
    patches = patch.extract(x, torch.arange(patch.rows(x)))
    assert patches.shape == (patch.rows(x), weight[0].numel())
    output = patches @ weight.flatten(1).t()
    # At most 81 products in float64, in two orders.
    torch.testing.assert_close(
        output.reshape(batch, *patch.positions(*size), 4).movedim(-1, 1), wanted, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_asymmetric_padding_and_other_dtypes(dtype: torch.dtype) -> None:
    x = rows(2, 3, 6, 7).to(dtype)
    patch = Patch((2, 4), (1, 1), ((0, 1), (1, 2)), (1, 1))
    padded = F.pad(x, (1, 2, 0, 1))
    unfolded = F.unfold(padded, (2, 4)).transpose(1, 2).flatten(0, 1)
    assert torch.equal(patch.extract(x, torch.arange(2 * 6 * 7)), unfolded)
    assert patch.positions(6, 7) == (6, 7)


def test_the_geometry_in_short() -> None:
    assert str(Patch((3,), (2,), ((1, 0),), (1,))) == "k3 s2 p1,0 d1"
    assert str(Patch((3, 3), (1, 2), ((1, 1), (0, 0)), (1, 1))) == "k3x3 s1x2 p1,1,0,0 d1x1"
