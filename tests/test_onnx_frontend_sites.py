"""Which weights of an ONNX model are sites, and why the others are left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper
from onnx_models import mlp, model_of, values

from lowrank_fx.errors import OptionError
from lowrank_fx.onnx_frontend.model import OnnxModel
from lowrank_fx.onnx_frontend.sites import find_sites
from lowrank_fx.patches import Patch

W = values(24, 20)


def reason_of(model: ModelProto, name: str) -> str:
    table = find_sites(OnnxModel(model))
    assert name not in [site.name for site in table.sites]
    (found,) = [entry.reason for entry in table.left_alone if entry.name == name]
    return found


def one(operator: str, inputs: list[str], shape: list[int | str], constants: dict[str, Any], **attributes: Any) -> Any:
    return model_of([helper.make_node(operator, inputs, ["y"], **attributes)], constants, {"x": shape})


def test_the_layers_of_a_small_model() -> None:
    table = find_sites(OnnxModel(mlp()))
    assert [site.name for site in table.sites] == ["up", "down", "head"]
    up, down, head = table.sites
    assert (up.out_features, up.in_features, up.transposed, up.biases, up.centered) == (
        48,
        32,
        True,
        ("up.bias",),
        True,
    )
    assert (down.out_features, down.in_features, down.biases) == (32, 48, ("down.bias",))
    assert (head.out_features, head.in_features, head.transposed, head.centered) == (20, 32, False, True)
    assert [call.node for call in (*up.calls, *head.calls)] == ["h0", "y"]
    assert {name: tap.width for name, tap in table.taps.items()} == {"x": 32, "h2": 48, "h5": 32}
    assert table.left_alone == ()


def test_a_tap_that_several_sites_read_is_one() -> None:
    nodes = [helper.make_node("MatMul", ["x", f"w{number}"], [f"y{number}"]) for number in range(3)]
    model = model_of(nodes, {f"w{number}": W for number in range(3)}, {"x": ["n", 24]}, ["y0", "y1", "y2"])
    table = find_sites(OnnxModel(model))
    assert len(table.sites) == 3
    assert list(table.taps) == ["x"]
    assert not table.sites[0].centered


def test_a_weight_that_two_nodes_read_is_one_site() -> None:
    nodes = [helper.make_node("MatMul", [name, "w"], [f"y{name}"]) for name in ("x", "z")]
    model = model_of(nodes, {"w": W}, {"x": ["n", 24], "z": ["n", 24]}, ["yx", "yz"])
    (site,) = find_sites(OnnxModel(model)).sites
    assert [call.tap for call in site.calls] == ["x", "z"]


def test_a_weight_without_a_name_of_its_own_is_called_by_its_bias() -> None:
    nodes = [helper.make_node("MatMul", ["x", "val_3"], ["h"]), helper.make_node("Add", ["h", "layer.q.bias"], ["y"])]
    model = model_of(nodes, {"val_3": W, "layer.q.bias": values(20)}, {"x": ["n", 24]})
    table = find_sites(OnnxModel(model))
    assert [(site.name, site.weight) for site in table.sites] == [("layer.q", "val_3")]
    for pattern in ("layer.*", "val_3"):
        assert find_sites(OnnxModel(model), [pattern]).sites == ()
    with pytest.raises(OptionError, match="matches no weight"):
        find_sites(OnnxModel(model), ["nothing*"])


def test_names_stay_apart() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "q.weight"], ["h"]),
        helper.make_node("MatMul", ["x", "val_3"], ["m"]),
        helper.make_node("Add", ["m", "q.bias"], ["n"]),
        helper.make_node("MatMul", ["x", "val_4"], ["o"]),
        helper.make_node("Add", ["o", "k.bias"], ["p"]),
        helper.make_node("MatMul", ["x", "val_5"], ["r"]),
        helper.make_node("Add", ["r", "k.bias"], ["s"]),
        helper.make_node("Sum", ["h", "n", "p", "s"], ["y"]),
    ]
    constants = dict.fromkeys(["q.weight", "val_3", "val_4", "val_5"], W)
    biases = dict.fromkeys(["q.bias", "k.bias"], values(20))
    table = find_sites(OnnxModel(model_of(nodes, {**constants, **biases}, {"x": ["n", 24]})))
    assert [site.name for site in table.sites] == ["q", "val_3", "k", "val_5"]
    assert [site.biases for site in table.sites] == [(), ("q.bias",), (), ()]


def test_a_bias_that_something_else_reads_does_not_move() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"]),
        helper.make_node("Mul", ["h", "b"], ["y"]),
    ]
    (site,) = find_sites(OnnxModel(model_of(nodes, {"w": W, "b": values(20)}, {"x": ["n", 24]}))).sites
    assert not site.centered
    assert site.biases == ()


def test_an_output_between_product_and_sum_keeps_the_bias_out() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    model = model_of(nodes, {"w": W, "b": values(20)}, {"x": ["n", 24]}, ["y", "h"])
    assert find_sites(OnnxModel(model)).sites[0].biases == ()


@pytest.mark.parametrize(
    ("attributes", "padding"),
    [
        ({"pads": [1, 0, 2, 1], "strides": [2, 1]}, ((1, 2), (0, 1))),
        ({"auto_pad": "VALID"}, ((0, 0), (0, 0))),
        ({"auto_pad": "SAME_UPPER"}, ((1, 1), (0, 1))),
        ({"auto_pad": "SAME_LOWER", "dilations": [2, 1]}, ((2, 2), (1, 0))),
    ],
)
def test_the_geometry_of_a_convolution(attributes: dict[str, Any], padding: tuple[tuple[int, int], ...]) -> None:
    kernel = values(16, 8, 3, 2)
    model = one("Conv", ["x", "w", "b"], ["n", 8, 9, 9], {"w": kernel, "b": values(16)}, **attributes)
    (site,) = find_sites(OnnxModel(model)).sites
    stride, dilation = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    assert site.patch == Patch((3, 2), tuple(stride), padding, tuple(dilation))
    assert (site.kind, site.out_features, site.in_features, site.centered) == ("conv2d", 16, 48, True)


def test_a_batch_of_matrices() -> None:
    (site,) = find_sites(OnnxModel(one("MatMul", ["x", "w"], ["n", 3, 5, 24], {"w": values(3, 24, 20)}))).sites
    assert (site.kind, site.groups, site.out_features, site.in_features) == ("bmm", 3, 60, 24)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (one("Gemm", ["x", "w"], ["n", 24], {"w": W}, alpha=2.0), "alpha or beta is not 1"),
        (one("Gemm", ["x", "w", "b"], ["n", 24], {"w": W, "b": values(20)}, beta=0.5), "alpha or beta is not 1"),
        (one("Gemm", ["x", "w"], [24, "n"], {"w": W}, transA=1), "transposes the activation"),
        (one("MatMul", ["w", "x"], [20, "n"], {"w": W}), "left operand"),
        (one("MatMul", ["v", "w"], [1], {"w": W, "v": values(5, 24)}), "another constant"),
        (one("MatMul", ["x", "w"], ["n", 2, 2, 24], {"w": values(2, 2, 24, 20)}), "4 dimensions where 2 or 3"),
        (one("Conv", ["x", "w"], ["n", 6, 9], {"w": values(6, 1, 3)}, group=6), "depthwise"),
        (
            one("Conv", ["x", "w"], ["n", 8, 9, 9], {"w": values(8, 8, 3, 3)}, auto_pad="SAME_UPPER", strides=[2, 2]),
            "depends on the size of the input",
        ),
        (one("ConvTranspose", ["x", "w"], ["n", 8, 9], {"w": values(8, 8, 3)}), "transposed convolution"),
        (one("Gather", ["w", "x"], ["n"], {"w": W}), "table lookup"),
        (one("Mul", ["x", "w"], [24, 20], {"w": W}), "used by Mul, which is not a linear layer"),
        (one("MatMul", ["x", "w"], ["n", 2], {"w": values(2, 2)}), "no rank below break-even"),
        (one("MatMul", ["x", "w"], ["n", 24], {"w": W.astype(np.int8)}), "quantised"),
    ],
)
def test_what_is_left_alone(model: ModelProto, reason: str) -> None:
    assert reason in reason_of(model, "w")


def test_a_quantised_weight_is_left_alone() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["f"]),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    model = model_of(nodes, {"w": W.astype(np.int8), "s": np.array(0.1, np.float32)}, {"x": ["n", 24]})
    assert reason_of(model, "w") == "its weight is quantised"


def test_a_weight_that_a_caller_may_replace_is_left_alone() -> None:
    model = one("MatMul", ["x", "w"], ["n", 24], {"w": W})
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [24, 20]))
    assert "a caller may replace it" in reason_of(model, "w")
    model.ir_version = 3
    assert len(find_sites(OnnxModel(model)).sites) == 1


def test_weights_of_branches_are_left_alone() -> None:
    then = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"])], "then", [], [helper.make_tensor_value_info("t", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("MatMul", ["x", "own"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", 1, None)],
        [numpy_helper.from_array(W, "own")],
    )
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)]
    model = model_of(nodes, {"w": W, "c": np.array(True)}, {"x": ["n", 24]})
    for name in ("w", "own"):
        assert "inside a branch or a loop" in reason_of(model, name)


def test_an_operator_of_another_domain_keeps_its_weight() -> None:
    model = one("MatMul", ["x", "w"], ["n", 24], {"w": W})
    model.graph.node[0].domain = "my.own"
    assert "used by my.own.MatMul" in reason_of(model, "w")


def test_a_weight_that_an_embedding_reads_too_is_left_alone() -> None:
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["e"]),
        helper.make_node("Gemm", ["e", "w"], ["y"], transB=1),
    ]
    model = model_of(nodes, {"w": values(40, 24), "ids": np.array([1, 2])}, {"x": [1]})
    assert reason_of(model, "w") == "an embedding is a table lookup, not a matrix product; 1 more use the same weight"
