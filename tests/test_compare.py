from __future__ import annotations

import dataclasses
import math
from collections import UserDict
from typing import Any

import pytest
import torch

from lowrank_fx.compare import ErrorSum, check_outputs, floating_outputs, relative_error
from lowrank_fx.errors import CalibrationError


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    extra: Any = None


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_floating_outputs_enters_every_container() -> None:
    a, b, c, d = (noise(2, seed=seed) for seed in range(4))
    found = floating_outputs({"first": [a, (b, torch.arange(3))], "second": Output(c, UserDict({"x": d}))})
    assert [id(tensor) for tensor in found] == [id(tensor) for tensor in (a, b, c, d)]


def test_model_output_is_entered() -> None:
    transformers = pytest.importorskip("transformers")
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=noise(2, 3), hidden_states=(noise(2, 3),))
    assert len(floating_outputs(output)) == 2


def test_output_without_floating_tensors_is_an_error() -> None:
    with pytest.raises(
        CalibrationError, match=r"tuple\(int64\[3\], None, a str\), which holds no floating.*forward_args= cannot help"
    ):
        floating_outputs((torch.arange(3), None, "text"))


def test_error_is_that_of_all_outputs_of_all_batches_as_one_vector() -> None:
    outputs = [(noise(4, 3, seed=s), {"x": 10 * noise(5, seed=s + 10)}) for s in range(3)]
    references = [(noise(4, 3, seed=s + 20), {"x": 10 * noise(5, seed=s + 30)}) for s in range(3)]
    total = ErrorSum()
    for output, reference in zip(outputs, references, strict=True):
        total.add(output, reference)
    flat = torch.cat([t.flatten().double() for first, second in outputs for t in (first, second["x"])])
    flat_reference = torch.cat([t.flatten().double() for first, second in references for t in (first, second["x"])])
    expected = ((flat - flat_reference).norm() / flat_reference.norm()).item()
    # float64 sums of 51 terms: 51 eps.
    assert total.relative == pytest.approx(expected, rel=51 * 2.0**-52)


def test_sums_are_float64_over_more_than_one_chunk() -> None:
    # float32 sums of 3 * 2^20 squares of 1e-4 lose digits; the ratio is exact in float64.
    reference = torch.ones(3 << 20)
    assert relative_error(reference * 1.5, reference) == pytest.approx(0.5, rel=1e-12)


def test_small_differences_of_low_precision_outputs_are_not_rounded_away() -> None:
    reference = torch.full((8,), 256.0, dtype=torch.bfloat16)
    output = torch.full((8,), 256.5)
    assert relative_error(output, reference) == pytest.approx(0.5 / 256, rel=1e-12)


def test_padding_never_counts() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    reference = (noise(2, 3, 4), noise(2, 7, seed=1))
    output = (reference[0] + 0.1, reference[1] + 0.2)
    spoiled = output[0].clone()
    spoiled[~mask] = float("nan")
    error = 0.1**2 * 3 * 4 + 0.2**2 * 14
    size = reference[0][mask].double().square().sum().item() + reference[1].double().square().sum().item()
    # The sums 0.1 + x are rounded to float32 (values of about 4 at most, 4 * 2^-24 against 0.1).
    assert relative_error((spoiled, output[1]), reference, mask) == pytest.approx(math.sqrt(error / size), rel=5e-6)


def test_zero_over_zero_and_something_over_zero() -> None:
    zero = torch.zeros(3)
    assert ErrorSum().relative == 0.0
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero + 1, zero) == math.inf
    assert relative_error(zero, zero + 1) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_output_that_is_not_finite_has_infinite_error(bad: float) -> None:
    assert relative_error(torch.tensor([1.0, bad]), torch.tensor([1.0, 2.0])) == math.inf
    total = ErrorSum()
    total.add(torch.tensor([bad]), torch.tensor([1.0]))
    total.add(torch.tensor([1.0]), torch.tensor([1.0]))
    assert total.relative == math.inf


def test_equal_infinities_are_no_error() -> None:
    reference = torch.tensor([-math.inf, 3.0, 4.0])
    assert relative_error(torch.tensor([-math.inf, 3.0, 4.5]), reference) == pytest.approx(0.1, rel=1e-12)
    assert relative_error(torch.tensor([math.inf, 3.0, 4.0]), reference) == math.inf
    assert relative_error(torch.tensor([0.0, 3.0, 4.0]), reference) == math.inf


def test_reference_with_nan_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="floating output 1 of the original model holds NaN"):
        relative_error((torch.ones(1), torch.ones(1)), (torch.ones(1), torch.tensor([math.nan])))


def test_complex_outputs_count_both_parts() -> None:
    reference = torch.tensor([3 + 4j])
    assert relative_error(torch.tensor([3 + 5j]), reference) == pytest.approx(0.2, rel=1e-12)
    with pytest.raises(CalibrationError, match=r"output 0 is torch\.float32"):
        relative_error(torch.tensor([3.0]), reference)


def test_other_structure_is_named() -> None:
    with pytest.raises(CalibrationError, match="1 floating-point tensors and the reference 2"):
        relative_error(torch.ones(2), (torch.ones(2), torch.ones(2)))


def test_other_shape_is_named_with_its_position() -> None:
    with pytest.raises(CalibrationError, match=r"floating output 1 of 2 has shape \[3\].*\[1\]"):
        relative_error((torch.ones(2), torch.ones(3)), (torch.ones(2), torch.ones(1)))


def test_gradients_are_not_followed() -> None:
    output = torch.ones(2, requires_grad=True)
    assert relative_error(output, torch.ones(2)) == 0.0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_and_nested_tensors_are_compared_by_their_values() -> None:
    dense = noise(4, 3)
    assert relative_error(dense.to_sparse() * 1.5, dense.to_sparse()) == pytest.approx(0.5, rel=1e-6)
    assert relative_error((dense * 1.5).to_sparse_csr(), dense) == pytest.approx(0.5, rel=1e-6)
    parts = [noise(2, 3), noise(5, 3, seed=1)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert relative_error(nested * 1.5, nested) == pytest.approx(0.5, rel=1e-6)


def test_rows_of_padding_are_left_out_of_pooled_outputs() -> None:
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    reference = noise(3, 7)
    value = reference.clone()
    value[1] = math.nan
    assert relative_error(value, reference, mask) == 0
    assert math.isinf(relative_error(value, reference))
    value[0] *= 1.5
    expected = 0.5 * reference[0].norm() / reference[[0, 2]].norm()
    assert relative_error(value, reference, mask) == pytest.approx(float(expected), rel=1e-6)


class TestCheckOutputs:
    def test_infinities_and_anything_at_padding_pass(self) -> None:
        mask = torch.tensor([[True, True], [True, False]])
        tokens, pooled = noise(2, 2, 3), noise(2, 3)
        tokens[1, 1] = math.nan
        pooled[0, 0] = -math.inf
        check_outputs((tokens, pooled, noise(0, 3)), mask)
        with pytest.raises(CalibrationError, match=r"output holds NaN \(floating output 0, float32\[2, 2, 3\]\)"):
            check_outputs((tokens, pooled))

    def test_nothing_finite(self) -> None:
        with pytest.raises(CalibrationError, match=r"has no finite value \(floating output 1, float32\[2, 3\]\)"):
            check_outputs((noise(2), torch.full((2, 3), math.inf)))

    def test_nothing_floating(self) -> None:
        with pytest.raises(CalibrationError, match="returns None, which holds no floating"):
            check_outputs(None)


def test_a_trial_of_another_shape_is_an_infinite_error() -> None:
    total = ErrorSum()
    total.add_trial(torch.ones(3, 2), torch.ones(3, 2))
    assert total.relative == 0.0
    total.add_trial((torch.ones(2, 2), torch.ones(1)), (torch.ones(3, 2), torch.ones(1)))
    assert total.relative == math.inf
    total.add_trial(torch.ones(3, 2), torch.ones(3, 2))
    assert total.relative == math.inf
