"""What loaders may yield and models may return: each works, or is one clear error, and the model stays as it is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lowrank_fx
from lowrank_fx import Keep, module
from lowrank_fx.compare import floating_outputs, relative_error
from lowrank_fx.errors import CalibrationError, LowRankError
from lowrank_fx.latency import PairedTiming
from lowrank_fx.module import LowRankModule
from lowrank_fx.plan import Plan

WIDTH = 24
ROUNDING = 1e-6  # the same operators on the same float32 numbers


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is not what these tests are about, and measuring it takes seconds."""
    monkeypatch.setattr(module, "measure", lambda session, candidate: PairedTiming(1.0, 1e-3, 1e-3, 0.0, 1))


@pytest.fixture(params=["export", "modules"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Net(nn.Module):
    """Three linear layers; subclasses bend what goes in and what comes out."""

    def __init__(self, out: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 32)
        self.middle = nn.Linear(32, 32)
        self.last = nn.Linear(32, out)
        chosen = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=chosen) / parameter.shape[-1] ** 0.5)

    def body(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(F.relu(self.middle(F.relu(self.first(x)))))
        return output

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Returns(Net):
    """A network whose output goes through a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.body(x))


def rows(*sizes: int, middle: tuple[int, ...] = ()) -> list[Tensor]:
    """Batches whose rows lie near an 8-dimensional subspace."""
    chosen = torch.Generator().manual_seed(1)
    basis = torch.randn(8, WIDTH, generator=chosen)
    return [torch.randn(size, *middle, 8, generator=chosen) @ basis for size in sizes or (16,) * 6]


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Checksums of every tensor, and every flag; NaN equals itself in bytes."""
    sums = [
        (name, hashlib.sha256(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest())
        for name, tensor in model.state_dict().items()
    ]
    flags = [each.training for each in model.modules()]
    return sums, flags, [parameter.requires_grad for parameter in model.parameters()]


def optimize(model: nn.Module, loader: Iterable[Any], **options: Any) -> LowRankModule:
    """``lowrank_fx.optimize``, held to leaving the model and the global random state alone, whatever happens."""
    model.train()
    next(iter(model.parameters())).requires_grad = False
    before, state = snapshot(model), torch.get_rng_state()
    try:
        options.setdefault("target", Keep(flops=0.7))
        return lowrank_fx.optimize(model, loader, compile=False, progress=False, **options)
    finally:
        assert snapshot(model) == before
        if not isinstance(loader, DataLoader):  # one draws its own seed, as it does in any loop
            assert torch.equal(torch.get_rng_state(), state)


def check(model: nn.Module, loader: Iterable[Any], *args: Any, **options: Any) -> LowRankModule:
    """Optimize; the result answers the call ``args`` as the model does, and exactly so where everything is dense."""
    fast = optimize(model, loader, **options)
    assert fast.plan.factored
    model.eval()
    with torch.no_grad():
        wanted = model(*args)
        assert type(fast(*args)) is type(wanted)
        # Rank 8 inputs, so ReLUs alone make errors: up to .4 measured. A wrong row or argument gives more than 1.
        assert 0 < relative_error(fast(*args), wanted) < 0.8
        assert fast.session is not None
        dense = fast.session.program.factorize({}, clone=True)
        bound, named = dense.bind(args, {})
        assert relative_error(dense.module(*bound, **named), wanted) <= ROUNDING
    return fast


def refused(model: nn.Module, loader: Iterable[Any], *parts: str, **options: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        optimize(model, loader, **options)
    for part in parts:
        assert part in str(caught.value)


@functools.cache
def plain_plan() -> Plan:
    """The plan for the plain network and plain batches."""
    return optimize(Net(), rows()).plan


# Batches --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Labelled:
    x: Tensor
    label: int


@dataclasses.dataclass
class Features:
    values: Tensor
    scale: Tensor


class Packed(Net):
    """Takes one argument that is a dataclass."""

    def forward(self, batch: Any) -> Tensor:
        output: Tensor = self.body(batch.values) * batch.scale
        return output


Named = namedtuple("Named", ["label", "x"])
Unnamed = namedtuple("Unnamed", ["image", "label"])

FORMS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda x: {"x": x, "label": x[:, 0]},
    "UserDict": lambda x: UserDict({"x": x}),
    "tuple": lambda x: (x, x[:, 0]),
    "list": lambda x: [x, x[:, 0]],
    "namedtuple by name": lambda x: Named(x[:, 0], x),
    "namedtuple by position": lambda x: Unnamed(x, x[:, 0]),
    "dataclass": lambda x: Labelled(x, 3),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_in_any_form_gives_the_same_plan(form: str) -> None:
    fast = check(Net(), [FORMS[form](batch) for batch in rows()], rows()[0])
    assert fast.plan == plain_plan()


def test_a_batch_encoding() -> None:
    transformers = pytest.importorskip("transformers")
    batches = [transformers.BatchEncoding({"x": batch, "token_type_ids": batch[:, :1]}) for batch in rows()]
    check(Net(), batches, rows()[0])


def test_a_dataclass_that_torch_cannot_see_into_is_named_with_the_cure(way: str) -> None:
    batches = [Features(batch, torch.ones(len(batch), 1)) for batch in rows()]
    parts = (
        "batch 0",
        "Features(values: float32[16, 24]",
        "torch.export.register_dataclass(Features)",
        "forward_args=",
    )
    refused(Packed(), batches, *parts, capture=way)
    refused(Packed(), [(batch,) for batch in batches], *parts, capture=way)


def test_a_registered_dataclass_is_passed_whole(way: str) -> None:
    @dataclasses.dataclass
    class Registered(Features):
        pass

    torch.export.register_dataclass(Registered)
    batches = [Registered(batch, torch.ones(len(batch), 1)) for batch in rows()]
    check(Packed(), batches, batches[0], capture=way)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda x: x.numpy(), ("ndarray of float32[16, 24]", "torch.as_tensor")),
        (lambda x: {"x": x.numpy()}, ("x: ndarray", "torch.as_tensor")),
        (lambda x: "text", ("a str", "forward_args=")),
        (lambda x: ["text", "more"], ("list(a str, a str)", "forward_args=")),
        (lambda x: torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged), ("nested tensor", "pad")),
        (lambda x: (UserDict({"x": x}),), ("UserDict(x: float32[16, 24])", "turn the UserDict into a dict")),
    ],
)
def test_what_is_no_batch_is_named(way: str, change: Callable[[Tensor], Any], parts: tuple[str, ...]) -> None:
    batches: list[Any] = list(rows())
    refused(Net(), [change(batch) for batch in batches], "batch 0", *parts, capture=way)
    batches[3] = change(batches[3])
    refused(Net(), batches, "batch 3", *parts, capture=way)


def test_arrays_through_forward_args() -> None:
    batches = [{"pixels": batch.numpy()} for batch in rows()]
    check(Net(), batches, rows()[0], forward_args=lambda batch: torch.as_tensor(batch["pixels"]))


class Graph(Net):
    """Multiplies by a sparse matrix before its layers, as graph networks do."""

    def forward(self, links: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.body(torch.sparse.mm(links, x))


def test_a_sparse_argument(way: str) -> None:
    table = rows(30)[0]
    batches = [
        (table, (torch.rand(16, 30, generator=torch.Generator().manual_seed(i)) > 0.8).float()) for i in range(6)
    ]
    sparse = [(links.to_sparse(), x) for x, links in batches]
    if way == "modules":
        check(Graph(), sparse, *sparse[0], capture=way)
    else:  # export has no dynamic sizes for a sparse tensor
        with pytest.raises(LowRankError):
            optimize(Graph(), sparse, capture=way)


@pytest.mark.parametrize("sizes", [(1, 16, 3, 8, 16, 5), (40,), (4, 4)])
def test_batches_of_any_sizes(way: str, sizes: tuple[int, ...]) -> None:
    check(Net(), rows(*sizes), rows(7)[0], capture=way)


def test_sequences_of_any_lengths(way: str) -> None:
    batches = [rows(8, middle=(length,))[0] for length in (5, 9, 1, 4, 7, 2)]
    check(Net(), batches, rows(3, middle=(6,))[0], capture=way)


def test_a_generator_an_iterator_and_a_data_loader_are_read_once() -> None:
    expected = plain_plan()
    assert optimize(Net(), (batch for batch in rows())).plan == expected
    assert optimize(Net(), iter(rows())).plan == expected
    dataset = TensorDataset(torch.cat(rows()), torch.zeros(96))
    assert optimize(Net(), DataLoader(dataset, batch_size=16)).plan == expected


def test_a_loader_that_draws_random_numbers_draws_the_users() -> None:
    drawn: list[Tensor] = []

    def loader() -> Iterator[Tensor]:
        for _ in range(6):
            drawn.append(torch.randn(16, WIDTH))
            yield drawn[-1]

    model = Returns(lambda y: F.dropout(y, training=True))
    state = torch.get_rng_state()
    expected = [torch.randn(16, WIDTH) for _ in range(6)]
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    lowrank_fx.optimize(model, loader(), target=Keep(flops=0.7), compile=False, progress=False)
    assert all(torch.equal(batch, wanted) for batch, wanted in zip(drawn, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), after)


# Bad loaders ----------------------------------------------------------------------------------------------------------


def test_an_empty_loader() -> None:
    refused(Net(), [], "the loader gave no batch")
    refused(Net(), iter(()), "the loader gave no batch")


@pytest.mark.parametrize("good", [0, 3, 5])
def test_a_loader_that_fails_half_way(way: str, good: int) -> None:
    def loader() -> Iterator[Tensor]:
        yield from rows()[:good]
        raise OSError("disk gone")

    refused(Net(), loader(), f"the loader failed at batch {good}: OSError: disk gone", capture=way)


def replaced(position: int, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    batches = rows()
    batches[position] = change(batches[position].clone())
    return batches


@pytest.mark.parametrize("position", [0, 3, 4])
def test_a_wrong_shape_is_named_with_its_batch(way: str, position: int) -> None:
    batches = replaced(position, lambda batch: batch[:, 1:])
    refused(Net(), batches, f"batch {position} is (float32[", ", 23])", capture=way)
    if way == "modules" or not position:
        refused(Net(), batches, "the model fails on it in 'first'", "cannot be multiplied", capture=way)


@pytest.mark.parametrize("position", [0, 3, 4])
def test_a_wrong_dtype_is_named_with_its_batch_and_layer(way: str, position: int) -> None:
    batches = replaced(position, Tensor.double)
    refused(Net(), batches, f"batch {position} is (float64[", "in 'first'", "same dtype", capture=way)


def test_images_of_several_sizes_are_for_the_tree() -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    chosen = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, size, 8, generator=chosen) for size in (8, 9, 10, 8, 12, 11)]
    refused(model, batches, "batch 1 is (float32[8, 3, 9, 8])", "capture='modules'", capture="export")
    check(model, batches, batches[1], capture="modules")


# NaN and infinities ---------------------------------------------------------------------------------------------------


def spoilt(value: float) -> Callable[[Tensor], Tensor]:
    def change(batch: Tensor) -> Tensor:
        batch[2, 3] = value
        return batch

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_in_a_batch_that_is_not_finite_is_named_with_the_layer(way: str, value: float) -> None:
    refused(Net(), replaced(3, spoilt(value)), "batch 3: the input of first: row 2", str(value), capture=way)


def test_nan_in_a_held_out_batch(way: str) -> None:
    refused(Net(), replaced(4, spoilt(float("nan"))), "batch 4:", "NaN", "the batch itself holds NaN", capture=way)


class Spoils(nn.Module):
    """Gives NaN for rows with a large first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return torch.where(x[:, :1] > 1e3, y - float("inf") + float("inf"), y)


@pytest.mark.parametrize(("position", "place"), [(3, "the input of net.first"), (4, "first appears in 'spoils'")])
def test_nan_in_the_middle_is_named_with_the_layer(way: str, position: int, place: str) -> None:
    model = nn.Sequential(OrderedDict(spoils=Spoils(), net=Net()))

    def change(batch: Tensor) -> Tensor:
        batch[2, 0] = 1e4
        return batch

    refused(model, replaced(position, change), f"batch {position}: ", place, capture=way)


def test_nan_in_the_output_is_named(way: str) -> None:
    refused(Returns(torch.log), rows(), "batch 0: the model's output holds NaN", "output 0", "'Returns'", capture=way)


def test_an_infinite_score_is_no_error(way: str) -> None:
    def mask_out(y: Tensor) -> Tensor:
        return torch.cat([y, torch.full_like(y[:, :1], float("-inf"))], 1)

    check(Returns(mask_out), rows(), rows()[0], capture=way)


# Masks ----------------------------------------------------------------------------------------------------------------


class Masked(Net):
    """A layer per token; takes a mask that it does not need."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.body(x)


REAL = torch.ones(8, 5, dtype=torch.long)
REAL[0] = 0  # a row of nothing but padding
REAL[3, 2:] = 0

MASKS = {
    "int": REAL,
    "bool": REAL.bool(),
    "float": REAL.float(),
    "added to scores": torch.where(REAL == 0, float("-inf"), 0.0),
}


def masked(mask: Tensor, padding: float) -> list[dict[str, Tensor]]:
    batches = rows(*(8,) * 6, middle=(5,))
    for batch in batches:
        batch[REAL == 0] = padding
    return [{"x": batch, "attention_mask": mask} for batch in batches]


@pytest.mark.parametrize("kind", MASKS)
def test_what_stands_at_padding_does_not_matter(way: str, kind: str) -> None:
    fast = optimize(Masked(), masked(MASKS[kind], float("nan")), capture=way)
    assert fast.plan.factored
    assert fast.plan.sites == optimize(Masked(), masked(MASKS[kind], 1.0), capture=way).plan.sites


def test_without_the_mask_the_same_padding_is_an_error(way: str) -> None:
    # Four dimensions say which pairs of tokens see each other, not which tokens are padding.
    batches = masked(REAL[:, None, None, :], float("nan"))
    refused(Masked(), batches, "batch 0: the input of first", "nan", capture=way)


def test_a_batch_that_is_padding_throughout_gives_no_rows(way: str) -> None:
    batches = masked(REAL, 1.0)
    batches[1]["attention_mask"] = torch.zeros_like(REAL)
    assert optimize(Masked(), batches, capture=way).plan.factored


class Pooled(Net):
    """One vector per row: NaN for a row that is padding throughout."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        weights = attention_mask[..., None].float()
        return (self.body(x) * weights).sum(1) / weights.sum(1)


def test_the_output_for_a_row_of_padding_does_not_matter(way: str) -> None:
    fast = optimize(Pooled(), masked(REAL, 1.0), capture=way)
    assert fast.plan.factored
    assert 0 < fast.plan.error < 0.8


# Outputs --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Answer:
    logits: Tensor
    count: int = 3


def model_output(y: Tensor) -> Any:
    return pytest.importorskip("transformers").modeling_outputs.SequenceClassifierOutput(logits=y)


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, 2 * y),
    "nested dict": lambda y: {"a": {"b": y, "nothing": None}, "classes": [y.argmax(-1)]},
    "dataclass": lambda y: Answer(y),
    "ModelOutput": model_output,
    "None first": lambda y: (None, y),
    "an int beside": lambda y: (y, 3, y.argmax(-1)),
    "a list per row": lambda y: [y[0], y[1:]],
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_any_structure(kind: str) -> None:
    model = Returns(OUTPUTS[kind])
    for capture in ("auto", "modules"):
        fast = check(model, rows(), rows()[0], capture=capture)
        with torch.no_grad():
            assert len(floating_outputs(fast(rows()[0]))) == len(floating_outputs(model(rows()[0])))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda y: "text", "a str"),
        (lambda y: float(y.sum()), "a float"),
        (lambda y: None, "None"),
        (lambda y: y.argmax(-1), "int64[16]"),
        (lambda y: (y.argmax(-1), "text"), "tuple(int64[16], a str)"),
        (lambda y: y.detach().numpy(), "ndarray of float32[16, 8]"),
    ],
)
def test_an_output_without_floating_tensors_is_refused_before_the_work(
    way: str, function: Callable[[Tensor], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def loader() -> Iterator[Tensor]:
        for index, batch in enumerate(rows()):
            read.append(index)
            yield batch

    def never(*args: Any) -> Any:
        raise AssertionError("the model was captured")

    monkeypatch.setattr("lowrank_fx.pipeline.take", never)
    refused(Returns(function), loader(), f"batch 0: the model returns {said}, ", "logits", "forward_args=", capture=way)
    assert read == [0]


def test_sparse_and_nested_outputs_are_measured() -> None:
    check(Returns(Tensor.to_sparse), rows(), rows()[0], capture="modules")
    ragged = Returns(lambda y: torch.nested.as_nested_tensor([y[:3], y[3:]], layout=torch.jagged))
    check(ragged, rows(), rows()[0], capture="modules")


@pytest.mark.parametrize("drop", [lambda y: F.dropout(y, 0.5, training=True), lambda y: y * torch.rand_like(y).round()])
def test_a_random_model_works_is_said_and_gives_the_same_plan_again(way: str, drop: Callable[[Tensor], Tensor]) -> None:
    fast = optimize(Returns(drop), rows(), capture=way)
    (note,) = (note for note in fast.plan.notes if "random" in note)
    found = re.search(r"differ by a relative (\d+\.\d+|\d+)", note)
    assert found is not None
    # Each entry is there or not by the toss of a coin: sum (a - b)^2 over sum b^2 is 1, here of 64 entries.
    assert 0.6 < float(found[1]) < 1.4
    assert note in " ".join(str(fast.report()).split())
    # The same numbers on both sides: errors are those of the factors, not of the coins (which give 1).
    assert 0 < fast.plan.error < 0.6
    torch.rand(7)
    assert optimize(Returns(drop), rows(), capture=way).plan.to_json() == fast.plan.to_json()


def test_a_steady_model_is_not_called_random(way: str) -> None:
    assert not [note for note in optimize(Net(), rows(), capture=way).plan.notes if "random" in note]


# Zero rows, and layers called several times or never ------------------------------------------------------------------


def test_a_call_with_no_rows(way: str) -> None:
    fast = check(Net(), rows(), rows()[0], capture=way)
    assert fast(rows()[0][:0]).shape == (0, 8)
    assert fast.fold()(rows()[0][:0]).shape == (0, 8)


class Experts(nn.Module):
    """Routes rows by their sign; the last expert never gets one, the second only in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Net(WIDTH) for _ in range(3))
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()
        mixed = torch.zeros_like(x)
        for position, expert in enumerate(self.experts):
            mixed[chosen == position] = expert(x[chosen == position])
        output: Tensor = self.last(mixed)
        return output


def test_an_expert_that_gets_no_token_stays_dense_and_is_said() -> None:
    batches = rows()
    batches[0][:, 0] = batches[0][:, 0].abs() + 0.1
    fast = check(Experts(), batches, batches[1], capture="modules")
    reasons = {site.name: site.reason for site in fast.plan.sites}
    assert {reasons[f"experts.2.{name}"] for name in ("first", "middle", "last")} == {"calibration never reached it"}
    assert any(site.name.startswith(("experts.0", "experts.1")) for site in fast.plan.factored)
    assert fast(batches[0][:0]).shape == (0, WIDTH)


class Twice(Net):
    """One layer runs three times, another never."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(32, 32)

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for _ in range(3):
            x = F.relu(self.middle(x))
        output: Tensor = self.last(x)
        return output


def test_layers_called_several_times_or_never(way: str) -> None:
    fast = check(Twice(), rows(), rows()[0], capture=way)
    assert "middle" in [site.name for site in fast.plan.factored]
    entries: list[Any] = [*fast.plan.left_alone, *fast.plan.sites]
    assert "never" in {entry.name: entry.reason for entry in entries}["never"]


@pytest.mark.parametrize("middle", [(3,), (3, 2), (2, 3, 2)])
def test_linears_on_three_to_five_dimensions(way: str, middle: tuple[int, ...]) -> None:
    batches = rows(*(8,) * 6, middle=middle)
    fast = check(Net(), batches, batches[0], capture=way)
    assert fast(batches[0][:3]).shape == (3, *middle, 8)


def test_a_numpy_round_trip_in_the_loader() -> None:
    batches = [torch.from_numpy(np.ascontiguousarray(batch.numpy())) for batch in rows()]
    assert optimize(Net(), batches).plan == plain_plan()
