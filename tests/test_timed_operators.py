"""What is held to the clock is what the finished model runs: the same operators on the same shapes."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lowrank_fx
from lowrank_fx import Keep, Tolerance, timed_operators
from lowrank_fx.forms import FORMS, forms_for
from lowrank_fx.latency import PairedTiming, paired_speedup
from lowrank_fx.module import LowRankModule
from lowrank_fx.patches import Patch
from lowrank_fx.sites import Site, SiteCall
from lowrank_fx.timed_operators import Operator, Pair, dense_run, runs

CPU = torch.device("cpu")


def linear(out: int, width: int, *, transposed: bool = False, bias: bool = True, dtype: str = "float32") -> Site:
    shape = (width, out) if transposed else (out, width)
    calls = (SiteCall("node", "tap", "a.bias" if bias else None),)
    return Site("a", "linear", "a.weight", transposed, out, width, shape, f"torch.{dtype}", None, calls, bias)


def bmm(groups: int, width: int, out: int) -> Site:
    calls = (SiteCall("node", "tap", None),)
    shape = (groups, width, out)
    return Site("a", "bmm", "a.weight", True, groups * out, width, shape, "torch.float32", None, calls, False, groups)


def conv(out: int, channels: int, patch: Patch, *, groups: int = 1, bias: bool = True) -> Site:
    shape = (out, channels // groups, *patch.kernel)
    calls = (SiteCall("node", "tap", "a.bias" if bias else None),)
    kind, width = f"conv{len(patch.kernel)}d", math.prod(shape[1:])
    return Site("a", kind, "a.weight", False, out, width, shape, "torch.float32", patch, calls, bias, groups)


SAME = Patch((4, 4), (1, 1), ((1, 2), (1, 2)), (1, 1))
CONVS = {
    "3 x 3": (conv(16, 12, Patch((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))), (9, 8)),
    "strided": (conv(16, 12, Patch((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1))), (9, 8)),
    "dilated, in groups": (conv(16, 12, Patch((3, 3), (1, 1), ((2, 2), (2, 2)), (2, 2)), groups=2), (9, 8)),
    "1 x 1": (conv(16, 12, Patch((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)), bias=False), (9, 8)),
    "even, same": (conv(16, 12, SAME), (9, 8)),
    "1d": (conv(16, 12, Patch((5,), (2,), ((2, 2),), (1,))), (21,)),
    "3d": (conv(8, 6, Patch((3, 3, 3), (1, 1, 1), ((1, 1), (1, 1), (1, 1)), (1, 1, 1))), (4, 5, 6)),
}


def of_conv(name: str, batch: int = 2) -> Operator:
    site, space = CONVS[name]
    assert site.patch is not None
    return Operator.of(site, 0, batch * math.prod(site.patch.positions(*space)), space, compiled=True)


def output(run: timed_operators.Run) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths", UserWarning)
        made = run()
    assert isinstance(made, Tensor)
    return made


def check(operator: Operator, pair: Pair) -> None:
    """Both have the same outputs' shape and layout, and take the FLOPs that are planned with."""
    dense, factored = runs(operator, pair, CPU)
    outputs, flops = [], []
    for run in (dense, factored):
        with FlopCounterMode(display=False) as counter:
            outputs.append(output(run))
        flops.append(counter.get_total_flops())
    assert outputs[0].shape == outputs[1].shape
    assert outputs[0].dtype == outputs[1].dtype == getattr(torch, operator.site.dtype.removeprefix("torch."))
    assert flops == [operator.flops(None), operator.flops(pair)]
    assert all(bool(made.isfinite().all()) for made in outputs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("transposed", "bias"), [(False, True), (False, False), (True, True), (True, False)])
def test_linear_layers(transposed: bool, bias: bool, dtype: str) -> None:
    site = linear(24, 20, transposed=transposed, bias=bias, dtype=dtype)
    operator = Operator.of(site, 0, 7, (), compiled=False)
    check(operator, Pair("lowrank", 5))
    assert output(dense_run(operator, CPU)).shape == (7, 24)


def test_regauged_pairs() -> None:
    operator = Operator.of(linear(24, 20), 0, 7, (), compiled=True)
    check(operator, Pair("lowrank", 5, regauged=True))
    assert Pair("lowrank", 5, regauged=True).kind != Pair("lowrank", 5).kind


def test_a_matrix_per_group() -> None:
    operator = Operator.of(bmm(3, 20, 16), 0, 7, (), compiled=True)
    check(operator, Pair("lowrank", 4))
    assert output(dense_run(operator, CPU)).shape == (3, 7, 16)


@pytest.mark.parametrize("name", CONVS)
def test_convolutions_in_every_form(name: str) -> None:
    operator = of_conv(name)
    forms = [form.name for form in forms_for(operator.site, None) if form.ranks(operator.site)]
    assert forms
    for form in forms:
        check(operator, Pair(form, FORMS[form].ranks(operator.site)[-1]))


def test_images_are_laid_out_as_the_compiler_does() -> None:
    site, space = CONVS["3 x 3"]
    made = [Operator.of(site, 0, 144, space, compiled=compiled) for compiled in (True, False)]
    laid_out = [output(dense_run(operator, CPU)).is_contiguous(memory_format=torch.channels_last) for operator in made]
    assert laid_out == [True, False]
    assert made[0].key != made[1].key


def test_equal_layers_are_one_operator_and_others_have_keys_of_their_own() -> None:
    site = linear(24, 20)
    same = Operator.of(site, 0, 7, (), compiled=True)
    other = Site(**{**vars(site), "name": "b", "weight": "b.weight", "tied": True, "centered": False})
    assert Operator.of(other, 0, 7, (), compiled=True) == same
    keys = {
        Operator.of(each, 0, rows, (), compiled=True).key
        for each in (site, linear(24, 20, bias=False), linear(24, 20, transposed=True), linear(24, 20, dtype="float64"))
        for rows in (7, 8)
    }
    assert len(keys | {of_conv(name).key for name in CONVS} | {of_conv("1d", 3).key}) == 8 + len(CONVS) + 1
    assert same.key == "linear, 24x20, float32, rows 7, bias"


def test_weights_come_from_memory_and_random_numbers_from_nowhere_else() -> None:
    before = torch.get_rng_state()
    dense, _ = runs(Operator.of(linear(1024, 512), 0, 2, (), compiled=True), Pair("lowrank", 8), CPU)
    # 2 MiB of weights, so four copies fill 8 MiB, and the fifth run takes the first again.
    made = [output(dense) for _ in range(5)]
    assert torch.equal(made[0], made[4])
    assert not torch.equal(made[0], made[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("threads", "clock"), [(1, time.thread_time), (2, time.perf_counter)])
def test_one_thread_is_timed_by_its_own_clock(
    threads: int, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    if time.get_clock_info("thread_time").resolution <= 1e-6:
        assert timed_operators._clock(CPU) is clock
    assert timed_operators._clock(torch.device("cuda")) is time.perf_counter


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the shapes and results of every matrix product and convolution that runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.convolution.default):
            tensors = tuple(tuple(arg.shape) for arg in args if isinstance(arg, Tensor))
            geometry = tuple(arg for arg in args if isinstance(arg, list))
            self.seen.add((func, tensors, str(geometry), tuple(made.shape)))
        return made


@pytest.fixture(scope="module")
def optimized() -> LowRankModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.Flatten(), nn.Linear(144, 40)
    )
    data = [torch.randn(4, 6, 8, 8) for _ in range(6)]
    return lowrank_fx.optimize(model, data, target=Keep(params=0.6), compile=False, progress=False)


def test_they_are_the_operators_of_the_model(optimized: LowRankModule) -> None:
    session = optimized.session
    assert session is not None
    call = session.calibration.effect_batches[0].call
    with torch.no_grad(), Shapes() as expected:
        optimized(*call.args)
    sites = {site.name: site for site in session.table.sites}
    seen = set()
    for entry in optimized.plan.factored:
        assert entry.rank is not None
        ((rows, space),) = session.calibration.calls_of(sites[entry.name])
        operator = Operator.of(sites[entry.name], 0, rows, space, compiled=False)
        _, factored = runs(operator, Pair(entry.form, entry.rank), CPU)
        with Shapes() as found:
            output(factored)
        seen |= found.seen
    assert seen
    assert seen <= expected.seen


@pytest.mark.slow
def test_by_a_real_clock_what_comes_back_pays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def measure(
        operator: Operator,
        pair: Pair,
        device: torch.device,
        *,
        min_rounds: int,
        max_seconds: float,
        turn_seconds: float,
    ) -> PairedTiming:
        asked.append(f"{operator.key} {pair}")
        with torch.no_grad():
            dense, factored = timed_operators.runs(operator, pair, device)
            return paired_speedup(
                dense,
                factored,
                device=device,
                max_seconds=max_seconds,
                turn_seconds=turn_seconds,
                min_rounds=min_rounds,
            )

    monkeypatch.setattr(timed_operators, "measure", measure)
    monkeypatch.setattr("lowrank_fx.latency.MAX_SECONDS", 3.0)
    monkeypatch.setenv("LOWRANK_FX_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.Tanh(), nn.Linear(256, 2)).eval()
    loader = [torch.randn(128, 256, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    made = lowrank_fx.optimize(model, loader, target=Tolerance(0.5), progress=False)
    assert asked
    for site in made.plan.factored:
        assert made.artifact.speeds[site.name].faster
    assert (made.timing is not None and made.timing.faster) if made.plan.factored else made.timing is None
    assert all(site.reason for site in made.plan.sites if not site.factored)
    with torch.no_grad():
        assert float((made(loader[0]) - model(loader[0])).norm() / model(loader[0]).norm()) < 0.6
