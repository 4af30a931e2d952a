"""A loss of the user's measures errors: MSE is the L2 error itself, cross entropy is KL, whatever the labels are."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_fx
from lowrank_fx import (
    Calibration,
    CalibrationError,
    Keep,
    LowRankModule,
    OptionError,
    Plan,
    Refine,
    StorageError,
    latency,
)
from lowrank_fx.batches import Call
from lowrank_fx.cache import CachedBatch, packed_call, unpacked_call
from lowrank_fx.compare import ErrorSum, floating_outputs
from lowrank_fx.judges import Judge
from lowrank_fx.losses import LossMeasure, measure_of
from lowrank_fx.program import Program
from lowrank_fx.tree_program import TreeProgram

Way = Literal["export", "modules"]
WAYS: tuple[Way, ...] = ("export", "modules")


@pytest.fixture(autouse=True)
def _timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MAX_SECONDS", 0.01)  # what a timing says is not tested


class Classifier(nn.Module):
    """Two layers and a head."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 24)
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.second(torch.relu(self.first(x)))))
        return logits


class Identity(nn.Module):
    """Returns its input times one: what a test hands in comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return logits * self.one


def seeded(kind: Callable[[], nn.Module] = Classifier) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def label_of(rows: Tensor) -> Tensor:
    """Labels that say which rows they belong to."""
    return (rows[:, 0] * 1000).long() % 6


def pairs(batches: int = 10, rows: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(rows, 16, generator=generator) for _ in range(batches)]
    return [(given, label_of(given)) for given in inputs]


def squares(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean squared error to targets that have nothing to do with the outputs."""
    return F.mse_loss(outputs, torch.sin(batch[1].to(outputs.dtype))[:, None].expand_as(outputs))


def entropy(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def made(model: nn.Module, loader: Any, **options: Any) -> LowRankModule:
    """The model at .6 of its parameters, taken as a tree (which is quicker) where nothing else is said."""
    options = {"target": Keep(params=0.6), "compile": False, "progress": False, "capture": "modules", **options}
    return lowrank_fx.optimize(model, loader, **options)


def judge(fn: Any, wanted: Any, batch: Any = ()) -> Judge:
    """What ``fn`` makes of a model that returns its input."""
    measure = measure_of(fn)
    assert measure is not None
    return measure.judge(TreeProgram.from_model(Identity()), Call((wanted,), {}, batch=batch), "batch 7")


def relative(judged: Judge, outputs: Tensor) -> float:
    return math.sqrt(judged.error((outputs,)) / judged.size)


def kl(value: Tensor, wanted: Tensor) -> float:
    """KL(wanted || value) of logits ``[rows, classes]``, summed over rows, in float64."""
    before, after = wanted.double().log_softmax(-1), value.double().log_softmax(-1)
    return float((before.exp() * (before - after)).sum())


# ---- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_the_mean_squared_error_gives_the_plan_and_the_errors_of_the_l2_distance(way: Way) -> None:
    model, loader = seeded(), pairs()
    plain, by_loss = (made(model, loader, capture=way, loss_fn=fn).plan for fn in (None, squares))
    assert [(site.name, site.form, site.rank) for site in by_loss.sites] == [
        (site.name, site.form, site.rank) for site in plain.sites
    ]
    assert any(site.factored for site in plain.sites)
    # The same sums in float64 in another order; the smallest error squared is 1e-4 of what it is the difference of.
    for name in ("error", "select_error", "predicted_error"):
        assert getattr(by_loss, name) == pytest.approx(getattr(plain, name), rel=1e-9)
    assert [name for name, _ in by_loss.candidates] == [name for name, _ in plain.candidates]
    assert not any("squares" in note for note in plain.notes)
    assert any("the loss 'squares'" in note for note in by_loss.notes)


def test_cross_entropy_is_kl_whatever_the_labels_are() -> None:
    generator = torch.Generator().manual_seed(2)
    wanted, value = (torch.randn(9, 5, generator=generator) for _ in range(2))
    expected = math.sqrt(kl(value, wanted) / kl(torch.zeros(9, 5), wanted))
    for labels in (torch.zeros(9, dtype=torch.long), torch.arange(9) % 5):
        found = relative(judge(entropy, wanted, (wanted, labels)), value)
        assert found == pytest.approx(expected, rel=1e-12)
    assert relative(judge("kl", wanted), value) == pytest.approx(expected, rel=1e-12)
    assert relative(judge("kl", wanted), torch.zeros(9, 5)) == pytest.approx(1.0, rel=1e-12)
    assert relative(judge("kl", wanted), wanted) == 0
    assert relative(judge(entropy, wanted, (wanted, labels)), wanted) < 1e-7  # root of a float64 rounding


@pytest.mark.parametrize("way", WAYS)
def test_labels_reach_the_loss_with_their_own_rows(way: Way) -> None:
    seen: set[tuple[int, torch.dtype]] = set()

    def fn(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        given, labels = batch
        assert torch.equal(labels, label_of(given)), "labels of other rows"
        assert len(labels) == len(outputs)
        assert torch.allclose(outputs.float(), model(given), atol=10), "outputs of other rows"
        seen.add((len(labels), outputs.dtype))
        return F.cross_entropy(outputs, labels)

    model, loader = seeded(), pairs()
    by_loss = made(model, loader, capture=way, loss_fn=fn).plan
    # Whole calibration batches of 12 rows, and the halves of those that are held out.
    assert seen == {(12, torch.float64), (6, torch.float64)}
    by_kl = made(model, loader, capture=way, loss_fn="kl").plan
    assert by_loss.error == pytest.approx(by_kl.error, rel=1e-9)
    assert [site.rank for site in by_loss.sites] == [site.rank for site in by_kl.sites]


def test_effect_batches_are_cut_with_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: set[int] = set()

    def fn(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert torch.equal(batch[1], label_of(batch[0]))
        rows.add(len(outputs))
        return F.cross_entropy(outputs, batch[1])

    monkeypatch.setattr("lowrank_fx.effects.EFFECT_FLOPS", 1.0)
    made(seeded(), pairs(), loss_fn=fn)
    assert rows == {12, 8, 6}, "16 rows, the least number, are 8 of each of two batches"


def test_kl_counts_every_position_that_is_no_padding_alike() -> None:
    generator = torch.Generator().manual_seed(3)
    wanted, value = (torch.randn(4, 7, 5, generator=generator) for _ in range(2))
    mask = torch.arange(7)[None] < torch.tensor([7, 2, 5, 1])[:, None]
    wanted[~mask] = math.nan
    value[~mask] = math.inf
    measure = measure_of("kl")
    assert measure is not None
    judged = measure.judge(TreeProgram.from_model(Identity()), Call((wanted,), {}, mask), "batch 7")
    assert judged.error((value,)) == pytest.approx(kl(value[mask], wanted[mask]), rel=1e-12)
    assert judged.size == pytest.approx(kl(torch.zeros(15, 5), wanted[mask]), rel=1e-12)


def test_a_loss_may_ignore_padding_whatever_it_holds() -> None:
    mask = torch.tensor([[True, True, False]])
    wanted, value = torch.tensor([[3.0, 4.0, math.nan]]), torch.tensor([[3.0, 4.5, 7.0]])
    measure = measure_of(lambda outputs, batch: outputs[mask].square().mean())
    assert measure is not None
    judged = measure.judge(TreeProgram.from_model(Identity()), Call((wanted,), {}, mask, batch=()), "batch 7")
    assert relative(judged, value) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize("fn", ["kl", lambda outputs, batch: outputs.logsumexp(-1).mean()])
def test_what_is_ruled_out_stays_ruled_out(fn: Any) -> None:
    wanted = torch.tensor([[1.0, -math.inf, 0.5, 2.0], [0.0, 3.0, 1.0, -math.inf]])
    value = torch.where(wanted.isfinite(), wanted * 0.9, wanted)
    rows = [[0, 2, 3], [0, 1, 2]]
    parts = [(value[i, keep], wanted[i, keep]) for i, keep in enumerate(rows)]
    judged = judge(fn, wanted)
    assert judged.error((value,)) == pytest.approx(sum(kl(*part) for part in parts), rel=1e-9)
    assert judged.size == pytest.approx(sum(kl(torch.zeros(3), part[1]) for part in parts), rel=1e-12)
    for place, bad in (((0, 0), math.nan), ((0, 0), -math.inf), ((0, 1), 0.0)):
        spoiled = value.clone()
        spoiled[place] = bad
        assert judged.error((spoiled,)) == math.inf
    assert judged.error((value[:1],)) == math.inf, "another shape"


def test_a_loss_that_is_not_convex_is_clipped() -> None:
    # Of z^4 - z^2 at 0.1 the curvature is negative, at 2 it is large.
    judged = judge(lambda outputs, batch: (outputs**4 - outputs**2).mean(), torch.tensor([0.1, 2.0]))
    assert judged.size == pytest.approx(3 * 16 - 4 + 3e-4 - 1e-2, rel=1e-6)  # D(0) = 3 y^4 - y^2, two rows, their mean
    assert judged.error((torch.tensor([0.2, 2.0]),)) == 0
    assert judged.error((torch.tensor([0.1, 2.1]),)) > 0


def test_complex_outputs_are_measured_too() -> None:
    wanted = torch.tensor([3 + 4j, 1j])
    judged = judge(lambda outputs, batch: (outputs - 2).abs().square().mean(), wanted)
    assert relative(judged, wanted * 1.2) == pytest.approx(0.2, rel=1e-6)  # 1.2 in complex64


def test_half_precision_is_widened_for_the_loss() -> None:
    wanted = torch.tensor([[100.0, 1.0]], dtype=torch.bfloat16)
    judged = judge(lambda outputs, batch: outputs.square().mean(), wanted)
    value = wanted.clone()
    value[0, 1] = 1 + 2**-7
    assert relative(judged, value) == pytest.approx(2**-7 / math.sqrt(10001), rel=1e-9)


def test_a_loss_with_float32_of_its_own_gets_float32() -> None:
    weight = torch.arange(1.0, 6.0)
    wanted = torch.randn(9, 5, generator=torch.Generator().manual_seed(4))
    seen: list[torch.dtype] = []

    def fn(outputs: Tensor, batch: Any) -> Tensor:
        loss = F.cross_entropy(outputs, batch, weight=weight)  # refuses float64 logits with float32 weights
        seen.append(outputs.dtype)
        return loss

    judged = judge(fn, wanted, torch.arange(9) % 5)
    assert set(seen) == {torch.float32}
    assert relative(judged, torch.zeros_like(wanted)) == pytest.approx(1.0, rel=1e-5)  # float32


# ---- outputs in the model's own classes ------------------------------------------------------------------------------


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


@dataclass
class Record:
    hidden: Tensor
    logits: Tensor
    steps: int = 3


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner = Classifier()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x), self.inner.first(x))


@pytest.mark.parametrize(
    ("way", "wrap"),
    [
        ("export", lambda logits, hidden: {"hidden": [hidden], "logits": logits}),
        ("export", lambda logits, hidden: Pair(logits, hidden)),
        ("modules", lambda logits, hidden: Pair(logits, hidden)),
        ("modules", lambda logits, hidden: Record(hidden, logits)),
        ("modules", lambda logits, hidden: UserDict(hidden=hidden, logits=logits)),
    ],
)
def test_the_loss_gets_what_the_model_returns(way: Way, wrap: Callable[[Tensor, Tensor], Any]) -> None:
    kind = type(wrap(torch.zeros(1), torch.zeros(1)))

    def fn(outputs: Any, batch: Any) -> Tensor:
        assert type(outputs) is kind
        logits = outputs.logits if hasattr(outputs, "logits") else outputs["logits"]
        return F.cross_entropy(logits, batch[1])

    torch.manual_seed(0)
    model = Wrapped(wrap).eval()
    by_loss, by_kl = (made(model, pairs(), capture=way, loss_fn=given).plan for given in (fn, "kl"))
    assert 0 < by_loss.error < 1
    assert by_loss.error == pytest.approx(by_kl.error, rel=1e-9), "the logits alone, not the hidden state"


# ---- the loader's batches --------------------------------------------------------------------------------------------


def test_rows_are_cut_wherever_a_batch_keeps_them() -> None:
    images = torch.arange(8.0).view(4, 2)

    def sample(number: int) -> dict[str, Any]:
        return {"boxes": torch.full((number, 4), float(number)), "name": str(number)}

    batch = UserDict(
        image=images,
        names=["a", "b", "c", "d"],
        targets=[sample(number) for number in range(4)],
        table=torch.zeros(3),
        record=Record(images + 1, images + 2),
        pair=Pair(images, images.sum(1)),
        scale=2.5,
    )
    call = Call((images,), {}, batch=batch).rows(1, 3)
    cut: Any = call.batch
    assert type(cut) is UserDict
    assert cut["image"] is call.args[0]
    assert cut["names"] == ["b", "c"]
    assert [target["name"] for target in cut["targets"]] == ["1", "2"]
    assert cut["table"].shape == (3,)
    assert torch.equal(cut["record"].logits, images[1:3] + 2)
    assert torch.equal(cut["pair"].hidden, images[1:3].sum(1))
    assert cut["scale"] == 2.5
    assert batch["names"] == ["a", "b", "c", "d"], "the loader's own batch stays"
    two = Call((images[:2],), {}, batch=(images[:2], torch.tensor([5, 6]))).rows(1, 2).batch
    assert [part.shape[0] for part in two] == [1, 1], "a pair of two images and two labels is no list of rows"


def test_a_batch_is_stored_once_with_its_call() -> None:
    ids, labels = torch.arange(6).view(2, 3), torch.tensor([1, 0])
    call = Call((), {"ids": ids}, ids > 0, UserDict(labels=labels, ids=ids, names=["a", "b"]))
    tensors: dict[str, Tensor] = {}
    data = packed_call(call, tensors, "batch 0")
    assert sum(tensor.numel() for tensor in tensors.values()) == 6 + 6 + 2  # ids, mask, labels
    back = unpacked_call(data, tensors)
    assert back.batch["ids"] is back.kwargs["ids"]
    assert torch.equal(back.batch["labels"], labels)
    assert back.batch["names"] == ["a", "b"]
    assert CachedBatch(back, ()).nbytes == CachedBatch(call, ()).nbytes == 8 * (6 + 2)


def same(first: Plan, second: Plan) -> bool:
    return first.to_json() == second.to_json()


@pytest.mark.parametrize("way", WAYS)
def test_a_saved_calibration_gives_the_same_plan(way: Way, tmp_path: Path) -> None:
    model, loader = seeded(), pairs()
    calibration = lowrank_fx.calibrate(model, loader, capture=way, loss_fn=entropy, progress=False)
    calibration.save(tmp_path)
    loaded = Calibration.load(tmp_path)
    whole = made(model, loader, capture=way, loss_fn=entropy).plan
    assert same(made(model, loaded, capture=way, loss_fn=entropy).plan, whole)
    if way == "modules":
        assert same(made(model, loaded).plan, made(model, loader).plan), "or measured by none"


def test_shards_that_are_merged_keep_their_labels() -> None:
    model, loader = seeded(), pairs()
    shards = [
        lowrank_fx.calibrate(model, loader, capture="modules", loss_fn=entropy, shard=(part, 2), progress=False)
        for part in range(2)
    ]
    merged = made(model, shards[0].merge(shards[1]), loss_fn=entropy).plan
    assert merged.error == pytest.approx(made(model, loader, loss_fn=entropy).plan.error, rel=1e-4)  # exact sketches
    other = lowrank_fx.calibrate(model, loader, capture="modules", shard=(1, 2), progress=False)
    with pytest.raises(CalibrationError, match="does not keep the loader's batches for a loss"):
        shards[0].merge(other)


def test_a_checkpoint_of_a_run_without_batches_is_of_another_run(tmp_path: Path) -> None:
    model, loader = seeded(), pairs()
    lowrank_fx.calibrate(model, loader, checkpoint=tmp_path, progress=False)
    with pytest.raises(StorageError, match="does not keep the loader's batches for a loss"):
        lowrank_fx.calibrate(model, loader, checkpoint=tmp_path, loss_fn=entropy, progress=False)


def test_a_calibration_without_batches_can_be_measured_by_kl_alone() -> None:
    model, loader = seeded(), pairs()
    calibration = lowrank_fx.calibrate(model, loader, capture="modules", progress=False)
    assert same(made(model, calibration, loss_fn="kl").plan, made(model, loader, loss_fn="kl").plan)
    with pytest.raises(CalibrationError, match="without the loader's batches, which the loss 'entropy' needs; pass"):
        made(model, calibration, loss_fn=entropy)


# ---- what cannot be measured -----------------------------------------------------------------------------------------


def broken(outputs: Tensor, batch: Any) -> Tensor:
    raise KeyError("labels")


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (
            broken,
            r"'broken' failed on batch 0: KeyError: 'labels'; it was given what the model returns, float32\[12, 6\]",
        ),
        (lambda outputs, batch: outputs.square(), r"returned float64\[12, 6\] for batch 0; return the mean loss"),
        (lambda outputs, batch: 1.0, "returned a float for batch 0; return the mean loss"),
        (lambda outputs, batch: (outputs - 1e6).log().mean(), "is nan for the original's own outputs on batch 0"),
        (lambda outputs, batch: outputs.detach().square().mean(), "does not depend on the model's outputs .* batch 0"),
        (
            lambda outputs, batch: torch.ones(1, requires_grad=True).square().mean(),
            "does not depend on the model's outputs .* on batch 0 it returned",
        ),
        (
            lambda outputs, batch: outputs.softmax(-1).log().relu().mean() + (outputs * 0).abs().sqrt().mean(),
            "gradient",
        ),
        (lambda outputs, batch: (outputs.abs() + outputs.square()).log().mean(), "not finite for outputs of zero on"),
        (lambda outputs, batch: outputs.mean(), "'<lambda>' measures nothing here: on no calibration batch"),
        (lambda outputs, batch: -outputs.square().mean(), "measures nothing here"),
    ],
)
def test_a_loss_that_measures_nothing_is_refused(fn: Any, message: str) -> None:
    model = seeded()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=message):
        made(model, pairs(), loss_fn=fn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_loss_that_fails_later_names_the_batch() -> None:
    def fn(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        if len(outputs) == 6:
            raise ValueError("too few rows")
        return F.cross_entropy(outputs, batch[1])

    with pytest.raises(
        CalibrationError, match=r"failed on held-out batch 4: ValueError: too few rows; .*float32\[6, 6"
    ):
        made(seeded(), pairs(), loss_fn=fn)


@pytest.mark.parametrize("bad", ["ce", 3, ["kl"]])
def test_what_is_no_loss_is_refused(bad: Any) -> None:
    with pytest.raises(OptionError, match=r"loss_fn=.*: give a function of what the model returns"):
        made(seeded(), pairs(), loss_fn=bad)
    with pytest.raises(OptionError, match="loss_fn="):
        lowrank_fx.calibrate(seeded(), pairs(), loss_fn=bad)


def test_kl_needs_logits() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Classifier(1)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x)
            return logits

    with pytest.raises(CalibrationError, match="divergence of its logits measures nothing here"):
        made(seeded(Scalar), pairs(), loss_fn="kl")


def test_labels_may_be_popped_and_random_numbers_drawn() -> None:
    def fn(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        torch.rand(3)
        return F.cross_entropy(outputs, batch.pop("labels"))

    loader = [{"x": given, "labels": labels} for given, labels in pairs()]
    model, state = seeded(), torch.get_rng_state()
    found = made(model, loader, loss_fn=fn).plan
    assert torch.equal(torch.get_rng_state(), state)
    assert found.error == pytest.approx(made(model, pairs(), loss_fn=entropy).plan.error, rel=1e-12)


# ---- what it is good for ---------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Logits plus a large common offset per row, which L2 sees and a softmax does not."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(16, 48)
        self.head = nn.Linear(48, 6)
        self.level = nn.Linear(16, 48)
        self.offset = nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = 3 * self.head(torch.tanh(self.classes(x)))
        offset: Tensor = self.offset(torch.tanh(self.level(x)))
        return logits + 30 * offset


def test_kl_keeps_what_a_softmax_sees() -> None:
    model, loader = seeded(Shifted), pairs(rows=40)
    other = torch.randn(400, 16, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        truth = model(other).softmax(-1)
    losses, ranks = {}, {}
    for name in (None, "kl"):
        fast = made(model, loader, loss_fn=name, target=Keep(params=0.6), skip=["head", "offset"])
        with torch.no_grad():
            losses[name] = float(F.cross_entropy(fast(other), truth))
        ranks[name] = {site.name: site.rank or 99 for site in fast.plan.sites}
    assert ranks[None]["level"] > ranks["kl"]["level"], ranks
    assert ranks[None]["classes"] < ranks["kl"]["classes"], ranks
    assert losses["kl"] < losses[None]


def test_another_target_is_measured_by_the_same_loss() -> None:
    fast = made(seeded(), pairs(), loss_fn=entropy)
    again = fast.replan(Keep(params=0.8)).plan
    assert same(again, made(seeded(), pairs(), loss_fn=entropy, target=Keep(params=0.8)).plan)
    assert again.error < fast.plan.error


def test_refinement_is_chosen_by_the_same_loss() -> None:
    fast = made(seeded(), pairs(), loss_fn="kl", refine=Refine(steps=20))
    assert fast.session is not None
    done, batches = fast.plan.refinement, fast.session.calibration.report_batches
    assert done is not None
    assert done.best_step > 0
    assert done.after < done.before
    with torch.no_grad():
        outputs = [(fast(*batch.call.args), batch.reference[0]) for batch in batches]
    errors, sizes = (
        sum(kl(value, wanted) for value, wanted in pairs)
        for pairs in (outputs, [(torch.zeros_like(wanted), wanted) for _, wanted in outputs])
    )
    assert fast.plan.error == pytest.approx(math.sqrt(errors / sizes), rel=1e-6)


def test_the_report_says_what_errors_are_measured_by() -> None:
    assert "Kullback-Leibler divergence of its logits" in str(made(seeded(), pairs(), loss_fn="kl").report())


def test_judged_batches_give_the_errors_of_the_l2_sum() -> None:
    model, loader = seeded(), pairs(3)
    program: Program = TreeProgram.from_model(model)
    other = Classifier().eval()
    other.load_state_dict(model.state_dict())
    other.head.weight.data.mul_(0.9)
    plain, judged = ErrorSum(), ErrorSum()
    with torch.no_grad():
        for given, labels in loader:
            call = Call((given,), {}, batch=(given, labels))
            batch = CachedBatch(call, tuple(floating_outputs(model(given))))
            outputs = (other(given),)
            batch.measure(outputs, plain)
            batch.judged(program, LossMeasure(squares), "batch").measure(outputs, judged)
    assert judged.relative == pytest.approx(plain.relative, rel=1e-10)
    assert 0.01 < plain.relative < 0.2
