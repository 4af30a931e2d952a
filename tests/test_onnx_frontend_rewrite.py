"""The rewritten ONNX model: what it computes, and that everything else in it stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from onnx_models import batches, computed, mlp, model_of, node_of, values
from torch import Tensor
from torch.nn import functional as F

from lowrank_fx.batches import Call
from lowrank_fx.errors import PlanError
from lowrank_fx.forms import Factors
from lowrank_fx.onnx_frontend.model import OnnxModel, read_model, written
from lowrank_fx.onnx_frontend.program import OnnxProgram
from lowrank_fx.program import Factored
from lowrank_fx.sites import Site

RANK = 5

# Two products of float32 numbers, sums of at most 300 terms: a few times sqrt(300) steps of 6e-8.
CLOSE = 3e-6


def random_pair(site: Site, rank: int = RANK, *, shift: bool = True) -> Factors:
    """Factors of no particular worth."""
    generator = torch.Generator().manual_seed(len(site.name))
    dtype = getattr(torch, site.dtype.removeprefix("torch."))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(0.3).to(dtype)

    moved = normal(site.out_features).double() if shift and site.centered else None
    if site.kind == "bmm":
        per = site.out_features // site.groups
        pair = normal(site.groups, site.in_features, rank), normal(site.groups, rank, per)
        return Factors(*pair, moved, site.groups, stacked=True)
    return Factors(normal(rank, site.in_features), normal(site.out_features, rank), moved)


def everything(program: OnnxProgram) -> Factored:
    return {site.name: (site, random_pair(site)) for site in program.find_sites().sites}


def is_close(found: Any, expected: Any, limit: float = CLOSE) -> bool:
    difference = np.asarray(found, np.float64) - np.asarray(expected, np.float64)
    return bool(np.linalg.norm(difference) <= limit * np.linalg.norm(np.asarray(expected, np.float64)))


def reference(model: ModelProto, factored: Factored, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the hand-made model of three layers computes with factors, in float64."""
    constant = {each.name: onnx.numpy_helper.to_array(each).astype(np.float64) for each in model.graph.initializer}

    def layer(name: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        _, factors = factored[name]
        assert factors.shift is not None
        product = factors.factor_out.double().numpy() @ factors.factor_in.double().numpy()
        moved: np.ndarray[Any, Any] = constant[f"{name}.bias"].reshape(-1) + factors.shift.numpy()
        made: np.ndarray[Any, Any] = rows @ product.T + moved
        return made

    x = x.astype(np.float64)
    hidden = np.maximum(layer("up", x), 0)
    return layer("head", layer("down", hidden) + x)


def test_the_factored_model_computes_its_factors() -> None:
    model = mlp()
    program = OnnxProgram(OnnxModel(model))
    factored = everything(program)
    made = program.factorize(factored, clone=True)
    onnx.checker.check_model(made.model.proto, full_check=True)
    x = batches(1)[0]
    expected = reference(model, factored, x)
    assert is_close(computed(made.model.proto, {"x": x})[0], expected)
    assert is_close(made.run(Call((), {"x": torch.from_numpy(x)}))[0], expected)
    # The same without a rewrite, and with the pairs multiplied out.
    call = Call((), {"x": torch.from_numpy(x)})
    assert is_close(program.exchanged(factored)(call)[0], expected)
    folded = made.fold({name: site for name, (site, _) in factored.items()})
    assert [node.op_type for node in folded.model.proto.graph.node] == [node.op_type for node in model.graph.node]
    assert is_close(folded.run(call)[0], expected)
    # What is shipped is multiplied in float64; stand-ins while plans are compared are not.
    for site, factors in factored.values():
        assert torch.equal(folded.model.tensor(site.weight), site.unmatrix(factors.dense_matrix()).float())
    partly = made.fold({"up": factored["up"][0]})
    assert is_close(partly.run(call)[0], expected)
    assert len(partly.model.proto.graph.node) == len(model.graph.node) + 2
    ops = [node.op_type for node in made.model.proto.graph.node]
    assert ops == ["MatMul", "MatMul", "Add", "Relu", "MatMul", "MatMul", "Add", "Add", "MatMul", "Gemm"]


def test_a_program_gives_what_others_give() -> None:
    program = OnnxProgram(OnnxModel(mlp()))
    factored = everything(program)
    x = torch.from_numpy(batches(1)[0])
    call = Call((), {"x": x})
    dense = program.run(call)[0]
    for site, trial in program.trials(call, program.find_sites().sites, {"up": factored["up"]}):
        both = {"up": factored["up"], site.name: factored[site.name]}
        torch.testing.assert_close(trial(factored[site.name][1]), program.exchanged(both)(call))
        if site.name == "up":
            torch.testing.assert_close(trial(None)[0], dense)
    torch.testing.assert_close(program.run(call)[0], dense)
    torch.testing.assert_close(program.copy().returned(call), dense)
    assert program.count_flops(call) == 2 * 24 * (2 * 32 * 48 + 32 * 20)
    assert program.params() == 32 * 48 * 2 + 48 + 32 + 20 * 32 + 20
    with pytest.raises(PlanError, match="factored already"):
        program.factorize(factored, clone=True).factorize(factored, clone=True)


@pytest.mark.parametrize("opset", [7, 13, 21])
def test_nothing_else_changes(opset: int) -> None:
    model = mlp()
    model.opset_import[0].version = opset
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    model.producer_name, model.producer_version, model.domain, model.model_version = "someone", "1.2", "org.x", 7
    model.doc_string = model.graph.doc_string = "a text"
    for holder in (model, model.graph, node_of(model, "h0"), node_of(model, "h2")):
        entry = holder.metadata_props.add()
        entry.key, entry.value = "key", "value"
    node_of(model, "h2").domain = "ai.onnx"  # another name of the standard's own
    model.graph.value_info.append(helper.make_tensor_value_info("h2", 1, ["rows", 48]))
    model.graph.value_info.append(helper.make_tensor_value_info("up.weight", 1, [32, 48]))
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("sparse", 1, [1], [2.0]), helper.make_tensor("places", 7, [1], [1]), [4]
    )
    model.graph.sparse_initializer.append(sparse)
    annotation = model.graph.quantization_annotation.add()
    annotation.tensor_name = "h2"
    floats = helper.make_tensor("head.bias", 1, [20], [0.5] * 20)  # not as raw bytes
    next(each for each in model.graph.initializer if each.name == "head.bias").CopyFrom(floats)
    before = model.SerializeToString(deterministic=True)

    program = OnnxProgram(OnnxModel(model))
    site = program.find_sites().sites[0]
    made = program.factorize({"up": (site, random_pair(site))}, clone=True).model.proto
    assert model.SerializeToString(deterministic=True) == before

    kept = {node.output[0]: node.SerializeToString(deterministic=True) for node in model.graph.node}
    for node in made.graph.node:
        if node.output[0] not in ("h0", "h0.factor_in"):
            assert node.SerializeToString(deterministic=True) == kept[node.output[0]]
    assert [node.output[0] for node in made.graph.node] == ["h0.factor_in", *kept]
    assert node_of(made, "h0").name == "up"
    assert node_of(made, "h0").metadata_props == node_of(model, "h0").metadata_props
    tensors = {each.name: each.SerializeToString(deterministic=True) for each in model.graph.initializer}
    others = {
        each.name: each.SerializeToString(deterministic=True)
        for each in made.graph.initializer
        if not each.name.startswith("up.")
    }
    assert others == {name: data for name, data in tensors.items() if not name.startswith("up.")}
    assert [each.name for each in made.graph.initializer][:3] == ["up.factor_in", "up.factor_out", "up.bias"]
    assert [each.name for each in made.graph.value_info] == ["h2"]
    # With the nodes and tensors of the original it is the original.
    for listed, own in ((made.graph.node, model.graph.node), (made.graph.initializer, model.graph.initializer)):
        del listed[:]
        listed.extend(own)
    made.graph.value_info.append(model.graph.value_info[1])
    assert made.SerializeToString(deterministic=True) == before


KERNELS: dict[str, list[tuple[int, ...]]] = {
    "channel": [(2 * 4, 4, 3, 2), (12, 4, 1, 1)],
    "channel_in": [(2 * 4, 4, 1, 1), (12, 4, 3, 2)],
    "spatial": [(2 * 4, 4, 3, 1), (12, 4, 1, 2)],
    "spatial_t": [(2 * 4, 4, 1, 2), (12, 4, 3, 1)],
    "tucker2": [(2 * 3, 4, 1, 1), (2 * 4, 3, 3, 2), (12, 4, 1, 1)],
}


@pytest.mark.parametrize(
    "attributes", [{"pads": [1, 0, 2, 1], "strides": [2, 3], "dilations": [2, 1]}, {"auto_pad": "SAME_LOWER"}, {}]
)
@pytest.mark.parametrize("form", KERNELS)
def test_convolutions_of_every_form(form: str, attributes: dict[str, Any]) -> None:
    given = {"group": 2, **attributes}
    constants = {"w": values(12, 4, 3, 2), "b": values(12)}
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", **given)
    program = OnnxProgram(OnnxModel(model_of([node], constants, {"x": ["n", 8, 11, 10]})))
    (site,) = program.find_sites().sites
    kernels = [torch.from_numpy(values(*shape, seed=place)) for place, shape in enumerate(KERNELS[form])]
    shift = torch.from_numpy(values(12, seed=9)).double()
    mid = kernels[1] if len(kernels) == 3 else None
    factors = Factors(kernels[0], kernels[-1], shift, 2, factor_mid=mid)
    made = program.factorize({site.name: (site, factors)}, clone=True).model.proto
    onnx.checker.check_model(made, full_check=True)
    assert [entry.op_type for entry in made.graph.node] == ["Conv"] * len(kernels)
    assert made.graph.node[-1].name == "conv"

    x = values(3, 8, 11, 10, seed=5)
    assert site.patch is not None
    sides = [amount for side in reversed(site.patch.padding) for amount in side]
    dense = factors.dense_matrix().reshape(12, 4, 3, 2)
    expected = F.conv2d(
        F.pad(torch.from_numpy(x).double(), sides),
        dense,
        torch.from_numpy(constants["b"]).double() + shift,
        site.patch.stride,
        0,
        site.patch.dilation,
        2,
    )
    found = computed(made, {"x": x})[0]
    assert found.shape == computed(program.model.proto, {"x": x})[0].shape
    assert is_close(found, expected.numpy())


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_in_other_dimensions(dims: int) -> None:
    weight = values(8, 6, *[3] * dims)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 2 * dims, strides=[2] * dims)
    program = OnnxProgram(OnnxModel(model_of([node], {"w": weight}, {"x": ["n", 6, *[7] * dims]})))
    (site,) = program.find_sites().sites
    first, second = torch.from_numpy(values(4, 6, *[3] * dims, seed=1)), torch.from_numpy(values(8, 4, *[1] * dims))
    made = program.factorize({"w": (site, Factors(first, second, None))}, clone=True).model.proto
    x = values(2, 6, *[7] * dims, seed=3)
    dense = torch.einsum("or...,ri...->oi...", second.double(), first.double())
    convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    expected = convolution(torch.from_numpy(x).double(), dense, padding=1, stride=2)
    assert is_close(computed(made, {"x": x})[0], expected.numpy())


@pytest.mark.parametrize("case", ["gemm", "bmm", "shared", "constant", "ir3", "float16", "double", "broadcast"])
def test_matrix_products_of_every_kind(case: str) -> None:
    kind: Any = {"float16": np.float16, "double": np.float64}.get(case, np.float32)
    element = {"float16": TensorProto.FLOAT16, "double": TensorProto.DOUBLE}.get(case, TensorProto.FLOAT)
    weight, bias = values(24, 20).astype(kind), values(20, seed=1).astype(kind)
    inputs: dict[str, Sequence[int | str]] = {"x": ["n", 24]}
    nodes, outputs = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])], ["y"]
    constants = {"w": weight, "b": bias}
    if case == "bmm":
        constants, inputs = {"w": values(3, 24, 20)}, {"x": ["n", 3, 7, 24]}
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    elif case == "shared":
        nodes.append(helper.make_node("Gemm", ["z", "w", "b"], ["v"]))
        inputs, outputs = {"x": ["n", 24], "z": ["n", 24]}, ["y", "v"]
    elif case == "constant":
        tensors = {name: onnx.numpy_helper.from_array(array) for name, array in constants.items()}
        made_by = [helper.make_node("Constant", [], [name], value=tensor) for name, tensor in tensors.items()]
        nodes, constants = [*made_by, *nodes], {}
    elif case == "broadcast":
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
        constants["b"], inputs = bias.reshape(1, 1, 20), {"x": ["n", 7, 24]}
    model = model_of(nodes, constants, inputs, outputs, ir=3 if case == "ir3" else 9, element=element)
    program = OnnxProgram(OnnxModel(model))
    (site,) = program.find_sites().sites
    factors = random_pair(site)
    made = program.factorize({site.name: (site, factors)}, clone=True).model.proto
    onnx.checker.check_model(made, full_check=True)
    shape = [3 if isinstance(size, str) else size for size in inputs["x"]]
    feeds = {name: values(*shape, seed=7 + place).astype(kind) for place, name in enumerate(inputs)}
    dense = site.unmatrix(factors.dense_matrix()).numpy()
    assert factors.shift is not None or case == "bmm"
    shift = 0 if factors.shift is None else bias.astype(np.float64) + factors.shift.numpy()
    limit = 5e-3 if case == "float16" else CLOSE  # five steps of float16, for sums that are rounded in between
    for name, found in zip(inputs, computed(made, feeds), strict=True):
        assert is_close(found, feeds[name].astype(np.float64) @ dense + shift, limit)
    call = Call((), {name: torch.from_numpy(array) for name, array in feeds.items()})
    assert is_close(program.exchanged({site.name: (site, factors)})(call)[0], computed(made, feeds)[0], limit)
    assert not any(each.name == "w" for each in (*made.graph.initializer, *made.graph.input))


def test_a_name_that_is_taken_is_not_taken_again() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["w.factor_in"]), helper.make_node("Relu", ["w.factor_in"], ["y"])]
    program = OnnxProgram(OnnxModel(model_of(nodes, {"w": values(24, 20)}, {"x": ["n", 24]})))
    (site,) = program.find_sites().sites
    made = program.factorize({"w": (site, random_pair(site))}, clone=True).model.proto
    onnx.checker.check_model(made, full_check=True)
    assert {each.name for each in made.graph.initializer} == {"w.factor_in.2", "w.factor_out"}


def test_tensors_outside_of_the_file(tmp_path: Path) -> None:
    model = mlp()
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    source, goal = tmp_path / "in" / "model.onnx", tmp_path / "out" / "small.onnx"
    onnx.save_model(model, source, save_as_external_data=True, location="weights.bin", size_threshold=2000)
    read = read_model(source)
    assert read.external == {"up.weight", "down.weight", "head.weight"}
    program = OnnxProgram(read)
    factored = {name: own for name, own in everything(program).items() if name != "head"}
    made = program.factorize(factored, clone=True)
    with written(made.model, goal) as draft:
        assert not goal.exists()
        assert draft.exists()
    files = sorted(file.name for file in goal.parent.iterdir())
    assert len(files) == 2
    assert files[0] == "small.onnx"
    assert files[1].startswith("small.onnx.")
    again = read_model(goal)
    assert (
        again.external
        == made.model.external
        == {
            *(f"{name}.{leaf}" for name in ("up", "down") for leaf in ("factor_in", "factor_out")),
            "head.weight",
        }
    )
    for name in again.constants:
        np.testing.assert_array_equal(again.array(name), made.model.array(name))
    x = batches(1)[0]
    np.testing.assert_array_equal(computed(again.proto, {"x": x})[0], computed(made.model.proto, {"x": x})[0])


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    goal = tmp_path / "model.onnx"
    goal.write_bytes(b"old")
    with pytest.raises(KeyError), written(OnnxModel(mlp()), goal):
        raise KeyError
    assert goal.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [goal]
