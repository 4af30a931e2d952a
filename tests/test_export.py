"""ONNX files: what is in their graphs, that onnxruntime computes the same, and that none is left otherwise."""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_fx
from lowrank_fx import Keep, LowRankModule, export_to_onnx
from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.errors import ExportError, OptionError
from lowrank_fx.export import Exported, export_onnx
from lowrank_fx.forms import Factors
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.storage import Artifact

onnx_ir: Any = importlib.import_module("onnx_ir")
runtime: Any = importlib.import_module("onnxruntime")

TOKENS = 40


class Tagger(nn.Module):
    """Token ids and a mask to a dictionary with a nested tuple; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(TOKENS, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, TOKENS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, gain: float = 1.0) -> dict[str, Any]:
        hidden = self.words(input_ids)
        hidden = hidden + gain * self.down(F.gelu(self.up(hidden)))
        hidden = torch.where(attention_mask.unsqueeze(-1) > 0, hidden, 0.0)
        return {"logits": self.head(hidden), "inner": (hidden, hidden.mean(1), None)}


class Pictures(nn.Module):
    """A convolution with its batch norm, and another output that is an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.head = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))).mean((2, 3)))
        return scores, scores.argmax(-1)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in eval mode whose weights do not depend on what ran before."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return make().eval()


def token_batch(seed: int, rows: int = 8, length: int = 6) -> dict[str, Tensor]:
    """Ids and a mask with padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    return {
        "input_ids": torch.randint(0, TOKENS, (rows, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths).long(),
    }


def made_of(model: nn.Module, batches: list[Any], **options: Any) -> LowRankModule:
    options.setdefault("target", Keep(params=0.7, of="sites"))
    return lowrank_fx.optimize(model, batches, compile=False, progress=False, **options)


@dataclass
class Case:
    """A model that was exported once, factored and folded."""

    module: LowRankModule
    factored: Exported
    folded: Exported


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Case:
    module = made_of(seeded(Tagger), [token_batch(seed) for seed in range(6)])
    assert [entry.name for entry in module.plan.factored] == ["up", "down"]
    folder = tmp_path_factory.mktemp("tagger")
    return Case(
        module, module.export_onnx(folder / "factored.onnx"), module.export_onnx(folder / "folded.onnx", fold=True)
    )


def read(exported: Exported) -> Any:
    return onnx_ir.load(exported.path)


def run(path: Path, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    """What onnxruntime computes, by output."""
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    return {output.name: torch.from_numpy(value) for output, value in zip(session.get_outputs(), values, strict=True)}


def distance(given: Tensor, expected: Tensor) -> float:
    """The relative L2 error, in the reference's float64."""
    return float((given - expected).detach().norm() / expected.detach().norm())


def products(model: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Every product with a weight, in order: the weight's name and shape."""
    found = []
    for node in model.graph.all_nodes():
        if node.op_type in ("MatMul", "Gemm", "Conv") and node.inputs[1].name.split(".")[0] in ("up", "down", "second"):
            found.append((node.inputs[1].name, tuple(node.inputs[1].shape)))
    return found


def stubbed(
    monkeypatch: pytest.MonkeyPatch, source: Exported, change: Callable[[Any], None] = lambda model: None
) -> None:
    """Have the next conversions give the model of a file that was written before."""

    def converted(*_: Any) -> Any:
        model = read(source)
        change(model)
        return model

    monkeypatch.setattr(export_to_onnx, "converted", converted)


# ---- what is in the file ---------------------------------------------------------------------------------------------


def test_a_pair_is_two_products_and_a_folded_one_is_dense(tagger: Case) -> None:
    ranks = {entry.name: entry.rank for entry in tagger.module.plan.factored}
    up, down = ranks["up"], ranks["down"]
    assert products(read(tagger.factored)) == [
        ("up.factor_in.T", (32, up)),
        ("up.factor_out.T", (up, 64)),
        ("down.factor_in.T", (64, down)),
        ("down.factor_out.T", (down, 32)),
    ]
    assert products(read(tagger.folded)) == [("up.weight.T", (32, 64)), ("down.weight.T", (64, 32))]
    assert tagger.factored.products == {"up": (1, 1), "down": (1, 1)}
    assert tagger.folded.products == {"up": (1,), "down": (1,)}
    assert tagger.folded.nodes == tagger.factored.nodes - 2  # type: ignore[operator]


def test_names_are_those_of_the_model(tagger: Case) -> None:
    model = read(tagger.factored)
    assert [value.name for value in model.graph.inputs] == ["input_ids", "attention_mask"]
    assert [value.name for value in model.graph.outputs] == ["logits", "inner.0", "inner.1"]
    assert tagger.factored.inputs == ("input_ids", "attention_mask")
    assert tagger.factored.outputs == ("logits", "inner.0", "inner.1")


def test_batch_and_sequence_may_change(tagger: Case) -> None:
    model = read(tagger.factored)
    shapes = [[str(size) for size in value.shape] for value in (*model.graph.inputs, *model.graph.outputs)]
    assert shapes == [["batch", "sequence"]] * 2 + [
        ["batch", "sequence", "40"],
        ["batch", "sequence", "32"],
        ["batch", "32"],
    ]
    assert tagger.factored.dynamic == ("batch", "sequence")
    assert len(set(tagger.factored.batch_sizes)) == 2


@pytest.mark.parametrize("name", ["factored", "folded"])
@pytest.mark.parametrize(("rows", "length"), [(3, 9), (11, 4)])
def test_onnxruntime_computes_what_the_model_does_in_float64(tagger: Case, name: str, rows: int, length: int) -> None:
    batch = token_batch(99, rows, length)
    exact = copy.deepcopy(tagger.module).double()(**batch)
    given = run(getattr(tagger, name).path, batch)
    expected = {"logits": exact["logits"], "inner.0": exact["inner"][0], "inner.1": exact["inner"][1]}
    assert list(given) == list(expected)
    for key, value in expected.items():
        # Three products of 64 terms in float32: 3e-7 was measured, 1e-6 is 17 roundings.
        assert distance(given[key], value) < 1e-6


def test_a_tied_weight_is_in_the_file_once(tagger: Case) -> None:
    initializers = read(tagger.factored).graph.initializers
    assert [name for name, value in initializers.items() if sorted(value.shape) == [32, TOKENS]] == ["words.weight"]
    dense = sum(tensor.numel() for tensor in tagger.module.parameters())
    stored = sum(value.const_value.size for value in initializers.values() if value.dtype.is_floating_point())
    assert stored <= dense + 1  # and the zero of the mask


def test_the_file_tells_the_plan_and_nothing_of_this_machine(tagger: Case) -> None:
    model = read(tagger.factored)
    assert lowrank_fx.Plan.from_json(model.metadata_props["lowrank_fx.plan"]) == tagger.module.plan
    data = tagger.factored.path.read_bytes()
    assert [piece for piece in ("stack_trace", str(Path.cwd()), "site-packages", ".py") if piece.encode() in data] == []


def test_folding_at_export_is_folding_and_exporting(tagger: Case, tmp_path: Path) -> None:
    source = read(tagger.folded)
    other = tagger.module.fold().export_onnx(tmp_path / "m.onnx", example=token_batch(3))
    same = [str(node.op_type) for node in source.graph], [str(node.op_type) for node in read(other).graph]
    assert same[0] == same[1]
    batch = token_batch(7)
    for first, second in zip(run(other.path, batch).values(), run(tagger.folded.path, batch).values(), strict=True):
        assert torch.equal(first, second)
    assert (other.source, other.folded) == ("the given example", ("up", "down"))


def test_the_result_says_what_was_checked(tagger: Case) -> None:
    made = tagger.factored
    assert made.bytes == made.path.stat().st_size
    assert (made.kind, made.folded, made.source, made.tolerance) == ("onnx", (), "held-out batches", 1e-5)
    assert set(made.errors) == set(made.outputs)
    assert 0 < made.error == max(made.errors.values()) < 1e-6
    assert str(made).startswith(f"{made.path}: 0.0 MB, opset {made.opset}, {made.nodes} nodes; ")
    assert str(made).endswith("(relative L2; batch sizes 4 and 5; held-out batches)")


# ---- what is refused leaves nothing ----------------------------------------------------------------------------------


def test_a_file_that_computes_something_else_is_not_left(
    tagger: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(model: Any) -> None:
        value = model.graph.initializers["down.bias"]
        value.const_value = onnx_ir.tensor(value.const_value.numpy() + 0.01, name="down.bias")

    path = tmp_path / "m.onnx"
    path.write_bytes(b"what was there before")
    stubbed(monkeypatch, tagger.factored, damage)
    with pytest.raises(
        ExportError, match=r"onnxruntime, on inputs of shape \[4, 6\], \[4, 6\], gives output 'logits' 0"
    ):
        tagger.module.export_onnx(path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"what was there before"


def test_the_tolerance_may_be_chosen(tagger: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubbed(monkeypatch, tagger.factored)
    with pytest.raises(ExportError, match=r"'logits' .* away from the model's \(relative L2\), more than the 1e-12"):
        tagger.module.export_onnx(tmp_path / "m.onnx", tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_a_factor_that_the_optimizer_lost_is_noticed(
    tagger: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubbed(monkeypatch, tagger.folded)
    with pytest.raises(
        ExportError, match=r"up is applied 1 times, but the file multiplies \(0, 0\) times by up.factor_in"
    ):
        tagger.module.export_onnx(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_model_is_refused(tagger: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_it(model: Any) -> None:
        model.graph[0].op_type = "Nonsense"

    stubbed(monkeypatch, tagger.factored, break_it)
    with pytest.raises(ExportError, match=r"onnx.checker refuses the file that was written: .*Nonsense"):
        tagger.module.export_onnx(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnx_ir", "onnxruntime"])
def test_a_missing_package_is_said_before_any_work(
    tagger: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExportError, match=rf"need the package '{name}': pip install 'lowrank_fx\[onnx\]'"):
        tagger.module.export_onnx(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_said(tagger: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="external_data='sometimes' is not legal"):
        tagger.module.export_onnx(tmp_path / "m.onnx", external_data="sometimes")  # type: ignore[arg-type]
    with pytest.raises(lowrank_fx.CalibrationError, match="input_ids"):
        tagger.module.export_onnx(tmp_path / "m.onnx", example={"words": torch.zeros(2, 2)})
    stubbed(monkeypatch, tagger.factored)
    with pytest.raises(ExportError, match=r"nowhere.*cannot be written: No such file or directory"):
        tagger.module.export_onnx(tmp_path / "nowhere" / "m.onnx")


# ---- weights apart, sizes, opsets ------------------------------------------------------------------------------------


def test_weights_may_lie_in_a_file_of_their_own(tagger: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubbed(monkeypatch, tagger.factored)
    apart = tagger.module.export_onnx(tmp_path / "m.onnx", external_data=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert apart.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert (tmp_path / "m.onnx").stat().st_size < tagger.factored.bytes
    batch = token_batch(5)
    expected = run(tagger.factored.path, batch)
    assert all(torch.equal(value, expected[name]) for name, value in run(apart.path, batch).items())


def test_weights_that_do_not_fit_lie_apart(tagger: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubbed(monkeypatch, tagger.factored)
    monkeypatch.setattr(export_to_onnx, "EXTERNAL_BYTES", 1000)
    with pytest.raises(ExportError, match="external_data=False: the weights are"):
        tagger.module.export_onnx(tmp_path / "m.onnx", external_data=False)
    assert list(tmp_path.iterdir()) == []
    tagger.module.export_onnx(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size > 1000


def test_every_size_may_be_fixed_and_the_opset_chosen(tagger: Case, tmp_path: Path) -> None:
    made = tagger.module.export_onnx(tmp_path / "m.onnx", dynamic=False, opset=18)
    model = read(made)
    assert [list(value.shape) for value in model.graph.inputs] == [[4, 6], [4, 6]]
    assert (made.opset, model.opset_imports[""], made.dynamic, made.batch_sizes) == (18, 18, (), (4,))
    assert "Gelu" not in {node.op_type for node in model.graph}  # it came with opset 20
    assert products(model)[0] == products(read(tagger.factored))[0]


def test_fixed_sizes_are_those_of_the_example(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    module = made_of(model, [torch.randn(8, 16, generator=generator) for _ in range(5)], target=Keep(params=0.7))
    example = torch.randn(1, 16, generator=generator)
    made = module.export_onnx(tmp_path / "m.onnx", dynamic=False, example=example)
    assert ([list(value.shape) for value in read(made).graph.inputs], made.batch_sizes) == ([[1, 16]], (1,))
    with torch.no_grad():
        assert (
            distance(run(made.path, dict(zip(made.inputs, [example], strict=True)))[made.outputs[0]], module(example))
            < 1e-6
        )


def test_a_goal_that_cannot_be_written_is_told_before_any_work(tagger: Case, tmp_path: Path) -> None:
    for goal in (tmp_path, tmp_path / "nowhere" / "m.onnx"):
        with pytest.raises(ExportError, match=f"{goal} cannot be written"):
            tagger.module.export_onnx(goal)


# ---- other models ----------------------------------------------------------------------------------------------------


def test_a_pair_of_convolutions(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, 12, 12, generator=generator) for _ in range(6)]
    module = made_of(seeded(Pictures), batches, target=Keep(params=0.6), skip=["first", "head"])
    (entry,) = module.plan.factored
    made = module.export_onnx(tmp_path / "m.onnx")
    pair = products(read(made))
    assert [name for name, _ in pair] == ["second.factor_in", "second.factor_out"]
    assert [shape[0] for _, shape in pair] == [entry.rank, 24]
    assert (made.outputs, made.errors["output_1"]) == (("output_0", "output_1"), 0.0)
    fresh = torch.randn(3, 3, 12, 12, generator=generator)
    scores, best = module.double()(fresh.double())
    given = run(made.path, {"x": fresh})
    assert distance(given["output_0"], scores) < 1e-6
    assert torch.equal(given["output_1"], best)


def test_a_regauged_pair_has_more_nodes(tmp_path: Path) -> None:
    batches = [torch.randn(16, 5, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    model = seeded(lambda: nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 8)))
    module = made_of(model, batches, target=Keep(params=0.8, regauge=True))
    assert any(entry.pivots is not None for entry in module.plan.factored)
    made = module.export_onnx(tmp_path / "m.onnx")
    assert made.error < 1e-6
    assert made.products["0"] == (1,)
    batch = torch.randn(3, 7, 48)
    (value,) = run(made.path, {made.inputs[0]: batch}).values()
    expected = module.double()(batch.double())
    assert distance(value, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_exported_where_onnxruntime_takes_it(dtype: torch.dtype, tmp_path: Path) -> None:
    batches = [torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(6)]
    model = seeded(lambda: nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))).to(dtype)
    module = made_of(model, batches)
    if dtype is torch.float16:
        made = module.export_onnx(tmp_path / "m.onnx")
        assert {value.dtype.name for value in read(made).graph.initializers.values()} == {"FLOAT16"}
        assert made.error < made.tolerance == 2**-7
        return
    with pytest.raises(
        ExportError, match=r"onnxruntime .* does not run the file on a CPU: .*; its kernels .* bfloat16"
    ):
        module.export_onnx(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


class Awkward(nn.Module):
    """Outputs under the names of inputs and of weights, one of them twice, and a constant among the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(32, 32)

    def forward(self, x: Tensor, pair: dict[str, Tensor], scaled: bool) -> dict[str, Any]:
        y = self.scale(x) if scaled else x
        return {"x": y, "scale.bias": y + pair["left"], "again": y, "linear": y.tanh(), "left right": [pair["right"]]}


def test_names_that_clash_are_kept_apart(tmp_path: Path) -> None:
    def batch(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        x, left, right = (torch.randn(8, 32, generator=generator) for _ in range(3))
        return x, {"left": left, "right": right}, True

    module = made_of(seeded(Awkward), [batch(seed) for seed in range(6)], forward_args=lambda given: given)
    made = module.export_onnx(tmp_path / "m.onnx")
    assert made.inputs == ("x", "pair.left", "pair.right")
    assert made.outputs == ("x_out", "scale.bias_out", "again", "linear", "left_right.0")
    x, pair, _ = batch(9)
    given = run(made.path, {"x": x, "pair.left": pair["left"], "pair.right": pair["right"]})
    expected = module(x, pair, True)
    assert distance(given["again"], expected["x"]) < 1e-6
    assert torch.equal(given["left_right.0"], pair["right"])


def test_equal_weights_may_become_one(tagger: Case, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        first = nn.Linear(32, 32)
    model = nn.Sequential(first, nn.Tanh(), copy.deepcopy(first)).eval()
    program = GraphProgram.from_capture(capture(model, Call((torch.zeros(4, 5, 32),), {})))
    left, values, right = torch.linalg.svd(first.weight.detach())
    factors = Factors(right[:8].contiguous(), (left[:, :8] * values[:8]).contiguous(), None)
    sites = {site.name: site for site in program.find_sites().sites}
    factored = program.factorize({name: (site, factors) for name, site in sites.items()}, clone=True)
    made = export_onnx(Artifact(factored, tagger.module.plan, sites, {}), tmp_path / "m.onnx")
    assert made.products == {"0": (1, 1), "2": (1, 1)}
    nodes = [node for node in read(made).graph if node.op_type == "MatMul"]
    assert [tuple(node.inputs[1].shape) for node in nodes] == [(32, 8), (8, 32)] * 2
    batch = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    exact = factored.module.double()(batch.double())
    assert distance(run(made.path, {made.inputs[0]: batch})["output"], exact) < 1e-6
    assert made.source == "random values in the shapes of the captured example"


class Looped(nn.Module):
    """Its control flow depends on values, so that no graph holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + 1 if float(y.sum()) > 0 else y


def test_a_module_tree_is_exported_if_it_can_become_a_graph(tmp_path: Path) -> None:
    batches = [torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    model = seeded(lambda: nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)))
    module = made_of(model, batches, capture="modules")
    made = module.export_onnx(tmp_path / "m.onnx")
    assert made.products == {entry.name: (1, 1) for entry in module.plan.factored}
    assert made.dynamic == ("batch",)
    module.save(tmp_path / "saved")
    loaded = lowrank_fx.load(model, tmp_path / "saved", compile=False)
    with pytest.raises(ExportError, match=r"module tree.* has to run once .* pass example= "):
        loaded.export_onnx(tmp_path / "n.onnx")
    stubbed_example = loaded.export_pt2(tmp_path / "n.pt2", example=batches[0])
    assert stubbed_example.error < 1e-6


def test_a_module_tree_that_export_refuses_stays_one(tmp_path: Path) -> None:
    batches = [torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    module = made_of(seeded(Looped), batches)
    assert module.artifact.program.way == "modules"
    with pytest.raises(ExportError, match=r"cannot become a graph, .*test_export.py:\d+ \(return y \+ 1 .*torch.where"):
        module.export_onnx(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_gpt2_with_its_cache(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=48, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = seeded(lambda: GPT2LMHeadModel(config))
    batches = [{"input_ids": token_batch(seed, 6, 10)["input_ids"]} for seed in range(5)]
    module = made_of(model, batches)
    made = module.export_onnx(tmp_path / "m.onnx")
    names = ("logits", "past_key_values.key_cache.0", "past_key_values.value_cache.0")
    assert (made.inputs, made.outputs) == (("input_ids",), names)
    assert set(itertools.chain(*made.products.values())) == {1}
    batch = token_batch(9, 3, 7)["input_ids"]
    expected = module.double()(input_ids=batch).logits
    given = run(made.path, {"input_ids": batch})["logits"]
    assert distance(given, expected) < 1e-5
