"""Every dtype, and every ambient state of torch, through the whole of ``optimize``."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_fx
from lowrank_fx import Keep, module
from lowrank_fx.compare import relative_error
from lowrank_fx.errors import CalibrationError
from lowrank_fx.latency import PairedTiming
from lowrank_fx.module import LowRankModule

WIDTH = 24
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is not what these tests are about, and measuring it takes seconds."""
    monkeypatch.setattr(module, "measure", lambda session, candidate: PairedTiming(1.0, 1e-3, 1e-3, 0.0, 1))


@pytest.fixture(params=["export", "modules"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def filled(model: nn.Module) -> Any:
    """Weights that keep the scale of what goes through them."""
    chosen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=chosen, dtype=torch.float32) / fan_in**0.5)
    return model.eval()


def network() -> nn.Module:
    made: nn.Module = filled(
        nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    )
    return made


def convolutions() -> nn.Module:
    norm = nn.BatchNorm2d(24)
    layers = [nn.Conv2d(3, 24, 3, padding=1, bias=False), norm, nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1)]
    made: nn.Module = filled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 16)))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.linspace(-0.2, 0.2, 24))
    norm.running_var.copy_(torch.linspace(0.5, 2.0, 24))
    return made


def rows(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Batches whose rows lie near an 8-dimensional subspace, made in float64 whatever the default dtype is."""
    chosen = torch.Generator().manual_seed(1)
    basis = torch.randn(8, WIDTH, generator=chosen, dtype=torch.float64) / 8**0.5
    return [(torch.randn(16, 8, generator=chosen, dtype=torch.float64) @ basis).to(dtype) for _ in range(6)]


def images(dtype: torch.dtype) -> list[Tensor]:
    chosen = torch.Generator().manual_seed(1)
    coarse = torch.randn(6, 8, 3, 3, 3, generator=chosen)
    return [F.interpolate(batch, size=(8, 8), mode="bilinear").to(dtype) for batch in coarse]


def checksum(model: nn.Module) -> str:
    state = [tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in model.state_dict().values()]
    return hashlib.sha256(b"".join(state)).hexdigest()


def optimize(model: nn.Module, batches: list[Any], capture: str, **options: Any) -> LowRankModule:
    """Optimize, held to leaving the model alone; something has to be factored."""
    before = checksum(model)
    options.setdefault("target", Keep(flops=0.7))
    try:
        fast = lowrank_fx.optimize(model, batches, compile=False, progress=False, capture=capture, **options)  # type: ignore[arg-type]
    finally:
        assert checksum(model) == before
    assert fast.plan.factored
    return fast


def assert_dense_is_the_original(fast: LowRankModule, model: nn.Module, batch: Tensor, rounding: float) -> None:
    with torch.no_grad():
        assert relative_error(fast.replan(Keep(flops=1.0))(batch), model(batch)) <= rounding


def assert_error_is_as_said(fast: LowRankModule, model: nn.Module, batch: Tensor) -> None:
    """Another batch of the same kind errs about as the held-out rows do."""
    with torch.no_grad():
        output, wanted = fast(batch), model(batch)
    assert output.dtype == wanted.dtype
    # 8 held-out rows against 16 others: within a factor of 2 measured.
    assert fast.plan.error / 4 < relative_error(output, wanted) < 4 * fast.plan.error


@pytest.mark.parametrize(
    ("make", "batches", "dtype"),
    [*((network, rows, dtype) for dtype in DTYPES), *((convolutions, images, dtype) for dtype in DTYPES[1:3])],
)
def test_a_model_of_one_dtype(
    way: str, make: Callable[[], nn.Module], batches: Callable[[torch.dtype], list[Tensor]], dtype: torch.dtype
) -> None:
    model = make().to(dtype)
    given = batches(dtype)
    fast = optimize(model, given, way)
    assert {parameter.dtype for parameter in fast.parameters()} == {dtype}
    # The batch norm that export folds rounds its convolution's weights and bias once; all else is the same operator on
    # the same numbers.
    rounding = 4 * torch.finfo(dtype).eps if make is convolutions and way == "export" else 0.0
    assert_dense_is_the_original(fast, model, given[0], rounding)
    assert_error_is_as_said(fast, model, given[0])
    folded = fast.fold()
    assert {parameter.dtype for parameter in folded.parameters()} == {dtype}
    with torch.no_grad():
        # Weights round once more (to nearest: half an eps each), and so do the rows between the factors.
        assert relative_error(folded(given[0]), fast(given[0])) <= 8 * torch.finfo(dtype).eps
        assert fast(given[0][:0]).shape == folded(given[0][:0]).shape == model(given[0][:0]).shape


class Mixed(nn.Module):
    """A bfloat16 body and a float32 head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network().bfloat16()
        self.head = filled(nn.Linear(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(x.bfloat16()).float())
        return output


def test_every_pair_has_the_dtype_of_its_weight(way: str) -> None:
    model = Mixed()
    fast = optimize(model, rows(), way, target=Keep(flops=0.5))
    names = {name: parameter.dtype for name, parameter in fast.named_parameters()}
    factors = {name: dtype for name, dtype in names.items() if "factor" in name}
    assert factors
    assert all(dtype == (torch.bfloat16 if name.startswith("body") else torch.float32) for name, dtype in names.items())
    assert_dense_is_the_original(fast, model, rows()[0], 0.0)
    assert_error_is_as_said(fast, model, rows()[0])


def test_integer_inputs(way: str) -> None:
    model = nn.Sequential(filled(nn.Embedding(50, WIDTH)), network())
    chosen = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 50, (8, 6), generator=chosen) for _ in range(6)]
    fast = optimize(model, batches, way)
    assert_dense_is_the_original(fast, model, batches[0], 0.0)
    assert_error_is_as_said(fast, model, batches[0])


# Autocast and other ambient states ------------------------------------------------------------------------------------


def test_a_call_under_autocast(way: str) -> None:
    model = network()
    batch = rows()[0]
    fast = optimize(model, rows(), way)
    dense = fast.replan(Keep(flops=1.0))
    with torch.no_grad():
        exact, exact_fast = model(batch), fast(batch)
        with torch.autocast("cpu", torch.bfloat16):
            output, output_fast = model(batch), fast(batch)
            assert torch.equal(dense(batch), output)
    assert output.dtype == output_fast.dtype == torch.bfloat16
    # Every product rounds its weights, its input and its output to 8 bits. The factored model has up to twice as many
    # products, so twice the rounding; and twice that for what differs between two draws.
    rounding = relative_error(output, exact)
    assert 0 < rounding < 16 * torch.finfo(torch.bfloat16).eps
    assert relative_error(output_fast, exact_fast) < 4 * rounding
    assert relative_error(output_fast, output) < relative_error(exact_fast, exact) + 5 * rounding


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AMBIENT: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": lambda: torch.set_grad_enabled(False),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
}


@functools.cache
def plain_model(way: str) -> LowRankModule:
    return optimize(network(), rows(), way)


@pytest.mark.parametrize("state", AMBIENT)
def test_the_ambient_state_changes_nothing_in_the_plan(way: str, state: str) -> None:
    plain = plain_model(way)
    model = network()
    with AMBIENT[state]():
        fast = optimize(model, rows(), way)
    assert fast.plan.sites == plain.plan.sites
    assert (fast.plan.error, fast.plan.select_error) == (plain.plan.error, plain.plan.select_error)
    said = [note for note in fast.plan.notes if "autocast" in note]
    assert len(said) == (state == "autocast")
    for parameter, expected in zip(fast.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, expected)
        assert parameter.requires_grad
    fast(rows()[0]).sum().backward()  # parameters made in inference mode could not
    assert all(parameter.grad is not None for parameter in fast.parameters())


@pytest.mark.parametrize("state", ["autocast", "inference mode"])
def test_planning_again_in_another_ambient_state_gives_the_same_plan(way: str, state: str) -> None:
    session = plain_model(way).session
    assert session is not None
    expected, _ = session.plan(Keep(flops=0.5))
    with AMBIENT[state]():
        assert session.plan(Keep(flops=0.5))[0] == expected


@pytest.mark.parametrize("capture", ["auto", "modules"])  # export (2.13) refuses such parameters
def test_a_model_made_in_inference_mode(capture: str) -> None:
    with torch.inference_mode():
        model, batches = network(), rows()
        fast = optimize(model, batches, capture)
    assert_error_is_as_said(fast, model, batches[0])


def test_a_model_that_runs_under_autocast_only_is_told_so(way: str) -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(CalibrationError, match=r"batch 0 .* same dtype") as caught,
    ):
        optimize(network(), rows(torch.bfloat16), way)
    assert "autocast" in " ".join(caught.value.__notes__)
