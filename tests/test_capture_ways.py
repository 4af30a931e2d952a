"""``optimize`` on models that ``torch.export`` refuses or cannot tell whole, and on models that are wrapped already."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_fx
from lowrank_fx import Keep, Tolerance
from lowrank_fx.compare import relative_error
from lowrank_fx.errors import CalibrationError, CaptureError, OptionError
from lowrank_fx.hooks import ATTRIBUTES
from lowrank_fx.module import LowRankModule
from lowrank_fx.modules import is_stand_in

WIDTH = 32


class Net(nn.Module):
    """Three layers and a function that applies them."""

    def __init__(self, function: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, 64)
        self.b = nn.Linear(64, 64)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(64, 10)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def plain(net: Net, x: Tensor) -> Tensor:
    out: Tensor = net.head(net.drop(torch.relu(net.b(torch.relu(net.a(x))))))
    return out


def branches(net: Net, x: Tensor) -> Tensor:
    h = torch.relu(net.a(x))
    if h.sum() > 0:
        h = torch.relu(net.b(h))
    out: Tensor = net.head(net.drop(h))
    return out


def loops(net: Net, x: Tensor) -> Tensor:
    h = torch.relu(net.a(x))
    while h.norm() > 4:
        h = torch.tanh(net.b(h)) * 0.5 * h
    out: Tensor = net.head(h)
    return out


def slices(net: Net, x: Tensor) -> Tensor:
    h = torch.relu(net.a(x))
    kept = 40 + int(h.amax().item() > 0)
    out: Tensor = net.head(net.b(h) * (torch.arange(64) < kept)[:64])
    return out[:, : kept % 11]


def through_numpy(net: Net, x: Tensor) -> dict[str, Tensor]:
    h = torch.from_numpy(np.tanh(net.a(x).detach().numpy()))
    return {"logits": net.head(torch.relu(net.b(h)))}


REFUSED = (branches, loops, slices, through_numpy)


def net(function: Callable[[Net, Tensor], Any], seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net(function)
    with torch.no_grad():  # layers of falling spectra, as trained ones are
        for layer in (model.a, model.b):
            u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(u @ torch.diag(s * torch.logspace(0.3, -2, len(s))) @ vh * 4)
    return model.eval()


def batches(count: int = 6, rows: int = 8) -> list[Tensor]:
    return list(torch.randn(count, rows, WIDTH, generator=torch.Generator().manual_seed(1)))


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Values, identities, flags and hooks of a model."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    digest = hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for _, tensor in tensors)).hexdigest()
    return (
        digest,
        [(name, id(tensor), tensor.requires_grad) for name, tensor in tensors],
        [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        [[list(getattr(module, kind, {}).items()) for kind in ATTRIBUTES] for module in model.modules()],
    )


def optimize(model: Any, **options: Any) -> LowRankModule:
    """``optimize``, and the check that the user's model comes back as it was."""
    watched = model if isinstance(model, nn.Module) else None
    before = None if watched is None else state_of(watched)
    chosen: dict[str, Any] = {"target": Keep(params=0.6), "compile": False, "progress": False, **options}
    made = lowrank_fx.optimize(model, batches(), **chosen)
    assert watched is None or state_of(watched) == before
    return made


def way(made: LowRankModule) -> str:
    return made.artifact.program.way


def check(made: LowRankModule, model: Callable[[Tensor], Any]) -> None:
    """The result is smaller, and on held-out rows as far from the original as the plan says."""
    assert made.plan.factored
    assert made.plan.totals.kept("params", "model") <= 0.6
    held_out = batches()[4][4:]
    with torch.no_grad():
        measured = relative_error(made(held_out), model(held_out))
    # The plan's figure is measured through the same pairs; only the order of sums may differ.
    assert measured == pytest.approx(made.plan.error, rel=1e-3, abs=1e-6)
    assert measured < 0.35


# What export refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_what_export_refuses_is_taken_as_a_tree(
    function: Callable[[Net, Tensor], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    model = net(function)
    made = optimize(model)
    assert way(made) == "modules"
    check(made, model)
    (note,) = (note for note in made.plan.notes if "tree of modules" in note)
    assert note.startswith(f"taken as a tree of modules, because torch.export refuses it at {Path(__file__).name}:")
    assert note.endswith("): what it does depends on a tensor's values")
    assert "torch.where" not in note
    assert capfd.readouterr() == ("", ""), "torch's own words about it stay off the terminal"


def test_two_runs_give_the_same_plan_byte_for_byte() -> None:
    plans = [optimize(net(branches)).plan.to_json() for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.fixture(scope="module")
def tree() -> tuple[Net, LowRankModule]:
    model = net(branches)
    return model, optimize(model)


def test_another_target_folding_saving_and_copying(tree: tuple[Net, LowRankModule], tmp_path: Path) -> None:
    model, made = tree
    x = batches()[0]
    with torch.no_grad():
        expected = made(x)
        other = made.replan(Tolerance(0.05))
        assert relative_error(other(x), model(x)) < 0.1
        copied = copy.deepcopy(made)
        assert torch.equal(copied(x), expected)
        folded = made.fold()
        # One product in place of two, in float32 (measured: 3e-7).
        assert relative_error(folded(x), expected) < 2e-6
        assert not any(is_stand_in(module) for module in folded.modules())
        for number, each in enumerate((made, folded)):
            each.save(tmp_path / str(number))
            loaded = lowrank_fx.load(model, tmp_path / str(number), compile=False)
            assert way(loaded) == "modules"
            assert torch.equal(loaded(x), each(x))
            assert loaded.plan == each.plan
            assert list(loaded.state_dict()) == list(each.state_dict())
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    for each in (made, copied, folded, other):
        assert not shared & {parameter.data_ptr() for parameter in each.parameters()}


def test_dtype_and_training(tree: tuple[Net, LowRankModule]) -> None:
    _, original = tree
    made = copy.deepcopy(original)
    x = batches()[0]
    expected = made(x).detach()
    assert made.to(torch.float64)(x.double()).dtype == torch.float64
    assert relative_error(made(x.double()), expected.double()) < 2e-6
    half = copy.deepcopy(original).to(torch.bfloat16)
    # Four layers in bfloat16, whose unit in the last place is 2 ** -8.
    assert relative_error(half(x.bfloat16()).float(), expected) < 4 * 2**-7
    made.to(torch.float32).train()
    assert made.training
    assert made.get_submodule("drop").training
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert relative_error(made(x).detach(), expected) > 0.1, "dropout obeys the flag in a tree"
    made(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert torch.equal(made.eval()(x), expected)


def test_copy_false_shares_what_is_not_factored() -> None:
    model = net(branches)
    made = optimize(model, copy=False)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    dense = [site.name for site in made.plan.sites if not site.factored]
    assert "head" in dense
    assert made.get_parameter("head.weight") is model.head.weight
    assert {p.data_ptr() for name, p in made.named_parameters() if "factor" in name}.isdisjoint(own)


def test_a_model_in_train_mode_is_calibrated_in_eval_mode() -> None:
    model = net(branches).train()
    model.b.eval()
    made = optimize(model)  # which compares the flags
    model.eval()
    check(made, model)


# What export takes, but not whole -------------------------------------------------------------------------------------


def test_printing_is_noted_in_a_graph_and_kept_in_a_tree(capsys: pytest.CaptureFixture[str]) -> None:
    def prints(net: Net, x: Tensor) -> Tensor:
        print("shape", tuple(x.shape))
        return plain(net, x)

    model = net(prints)
    graph = optimize(model)
    assert way(graph) == "export"
    assert "FakeTensor" not in capsys.readouterr().out
    assert [note for note in graph.plan.notes if "prints while it runs" in note]
    graph(batches()[0])
    assert capsys.readouterr().out == ""
    tree = optimize(model, capture="modules")
    capsys.readouterr()
    tree(batches()[0])
    assert capsys.readouterr().out == f"shape (8, {WIDTH})\n"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("capture", ["auto", "modules"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_checkpointed_layers_are_sites(reentrant: bool, capture: str) -> None:
    def checkpointed(net: Net, x: Tensor) -> Tensor:
        h = torch.relu(net.a(x))
        h = torch.relu(checkpoint(net.b, h, use_reentrant=reentrant))
        out: Tensor = net.head(h)
        return out

    model = net(checkpointed)
    made = optimize(model, capture=capture)
    assert [site.name for site in made.plan.sites] == ["a", "b", "head"]
    assert not made.plan.left_alone
    assert all("never reached" not in site.reason for site in made.plan.sites)
    check(made, model)
    trained = made.train()
    trained(batches()[0].requires_grad_()).sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


def test_hooks_of_the_user_are_kept_in_a_tree_and_noted_in_a_graph() -> None:
    fired: list[str] = []
    for capture, expected in (("modules", ["hook"]), ("export", [])):
        model = net(plain)
        handle = model.b.register_forward_hook(lambda *_: fired.append("hook"))
        made = optimize(model, capture=capture)
        assert fired == []
        made(batches()[0])
        assert fired == expected
        noted = [note for note in made.plan.notes if "hooks on b were detached" in note]
        assert bool(noted) == (capture == "export")
        fired.clear()
        model(batches()[0])
        assert fired == ["hook"]
        fired.clear()
        handle.remove()


# Which way ------------------------------------------------------------------------------------------------------------


def test_the_three_ways() -> None:
    model = net(plain)
    assert [way(optimize(model, capture=capture)) for capture in ("auto", "export", "modules")] == [
        "export", "export", "modules",
    ]  # fmt: skip
    refused = net(branches)
    with pytest.raises(
        CaptureError, match=r"could not capture Net at .*test_capture_ways.py:\d+ \(if h.sum\(\) > 0:\)"
    ):
        optimize(refused, capture="export")
    with pytest.raises(CaptureError, match="capture='modules', which keeps the model's own Python"):
        optimize(refused, capture="export")
    with pytest.raises(OptionError, match="capture='graph': the legal values are 'auto', 'export', 'modules'"):
        optimize(refused, capture="graph")


def test_a_graph_for_one_batch_size_only_is_not_taken_by_itself() -> None:
    def one_size(net: Net, x: Tensor) -> Tensor:
        return plain(net, x.view(8, WIDTH) if len(x) == 8 else x)

    def unrolled(net: Net, x: Tensor) -> Tensor:
        return torch.stack([plain(net, row) for row in x])

    for function in (one_size, unrolled):
        model = net(function)
        made = optimize(model)
        assert way(made) == "modules"
        assert any("for one batch size only" in note for note in made.plan.notes)
        x = torch.cat(batches()[:2])[:11]
        assert relative_error(made(x), model(x)) < 0.3


# Models that are wrapped already --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [plain, branches], ids=lambda function: function.__name__)
@pytest.mark.parametrize("kind", ["wrapped", "in place", "submodule"])
def test_a_compiled_model(function: Callable[[Net, Tensor], Any], kind: str) -> None:
    model = net(function)
    original = copy.deepcopy(model)
    given: Any = model
    if kind == "wrapped":
        given = torch.compile(model, backend="eager")
    elif kind == "in place":
        model.compile(backend="eager")
    else:
        model.b = torch.compile(model.b, backend="eager")  # type: ignore[assignment]
    for capture in ("auto", "modules"):
        made = optimize(given, capture=capture)
        assert way(made) == ("export" if function is plain and capture == "auto" else "modules")
        assert {site.name for site in made.plan.sites} <= {"a", "b", "head", "b._orig_mod"}
        assert len(made.plan.sites) == 3
        check(made, original)


def test_a_graph_module_has_its_layers(tmp_path: Path) -> None:
    class Plain(nn.Sequential):
        pass

    inner = net(plain)
    model = torch.fx.symbolic_trace(Plain(inner.a, nn.ReLU(), inner.b, nn.ReLU(), inner.head))
    for capture in ("auto", "modules"):
        made = optimize(model, capture=capture)
        assert [site.name for site in made.plan.sites] == ["0", "2", "4"]
        check(made, model)
        made.save(tmp_path)
        assert torch.equal(lowrank_fx.load(model, tmp_path, compile=False)(batches()[0]), made(batches()[0]))


def test_an_exported_program() -> None:
    model = net(plain)
    shapes = ({0: torch.export.Dim("rows", min=2)},)
    program = torch.export.export(model, (batches()[0],), dynamic_shapes=shapes)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    made = optimize(program)
    assert way(made) == "export"
    check(made, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict.items())
    # Halves of a held-out batch do not fit a program for one size.
    with pytest.raises(CalibrationError, match=r"batch 4 .*inputs of shape \(4, 32\)"):
        optimize(torch.export.export(model, (batches()[0],)))
    with pytest.raises(CaptureError, match="has no module tree"):
        optimize(program, capture="modules")


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_torchscript_module_is_refused_in_words() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x))

    model = torch.jit.trace(Small(), batches()[0])  # type: ignore[no-untyped-call]
    with pytest.raises(CaptureError, match=r"TorchScript.*give the model that it was made from"):
        optimize(model)


# Compiling the result -------------------------------------------------------------------------------------------------


def test_a_tree_is_compiled_with_graph_breaks() -> None:
    model = net(branches)
    made = optimize(model, compile=True)
    assert made.compiled
    assert made.timing is not None
    check(made, model)
    assert not [note for note in made.plan.notes if "without torch.compile" in note]


def test_a_tree_that_torch_compile_refuses_runs_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(module: nn.Module) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no kernel for this\nand a long story")

        return run

    monkeypatch.setattr("lowrank_fx.session.compile_module", refuses)
    model = net(branches)
    made = optimize(model, compile=True)
    assert not made.compiled
    assert (
        "it runs without torch.compile, which refuses this model: RuntimeError: no kernel for this" in made.plan.notes
    )
    check(made, model)
