"""Helpers for authors of passes: run one pass and check everything that a pass must keep.

A test of a pass makes four statements: the same numbers, the exact count of rewrites, the graph as golden text, and
near misses left alone with their reasons. :func:`run_pass` makes the first and returns what the second and the fourth
need; :func:`graph_text` makes the third.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lowrank_fx.passes.base import Pass, PassManager, PassResult, clean
from lowrank_fx.passes.verify import registered_tensors

Inputs = Sequence[Any] | Mapping[str, Any]


def run_pass(gm: GraphModule, pass_: Pass, inputs: Inputs, *, tolerance: float) -> PassResult:
    """Run one pass on a captured graph, in place, and check what every pass must keep.

    The verifier runs before and after. The outputs must keep their structure, class, dtypes, shapes and numbers, the
    inputs their names, and the tensors that were registered before their values (they belong to the user's model).

    Args:
        gm: the captured graph; dead code is removed from it first.
        pass_: the pass.
        inputs: one batch: positional arguments, or a mapping of keyword arguments.
        tolerance: the largest relative L2 difference of a floating output; other outputs must be equal.

    Returns:
        What the pass said it did.

    Raises:
        AssertionError: something that a pass must keep was not kept.
        PassError: the pass failed, or broke the graph's invariants.
    """
    clean(gm)
    expected = _call(gm, inputs)
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    owned = [(name, tensor, tensor.detach().clone()) for name, tensor in registered_tensors(gm)]
    ((_, result),) = PassManager([pass_], verify=True).run(gm)
    for name, tensor, copy in owned:
        if not torch.equal(tensor, copy) and not _both_nan(tensor, copy):
            raise AssertionError(f"{pass_.name} wrote into {name}, which belongs to the model that was captured")
    after = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    if after != names:
        raise AssertionError(f"{pass_.name} changed the inputs from {names} to {after}")
    _compare(_call(gm, inputs), expected, tolerance)
    return result


def assert_equivalent(
    actual: Callable[..., Any], expected: Callable[..., Any], inputs: Inputs, *, rtol: float = 1e-5
) -> None:
    """Check that two models return the same for one batch.

    Args:
        actual: the model under test.
        expected: the model to compare with; it may be of another dtype only where its outputs are not.
        inputs: positional arguments, or a mapping of keyword arguments.
        rtol: the largest relative L2 difference |actual - expected| / |expected| of a floating output, computed in
            float64. Outputs of other dtypes must be equal.

    Raises:
        AssertionError: structure, class, dtype, shape or numbers of an output differ; the message says which.
    """
    _compare(_call(actual, inputs), _call(expected, inputs), rtol)


def _call(model: Callable[..., Any], inputs: Inputs) -> Any:
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    # An output may be a view of an input, and the next call must not change what this one returned.
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), output)


def _both_nan(a: Tensor, b: Tensor) -> bool:
    return a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _compare(actual: Any, expected: Any, tolerance: float) -> None:
    given, given_tree = pytree.tree_flatten_with_path(actual)
    wanted, wanted_tree = pytree.tree_flatten_with_path(expected)
    if given_tree != wanted_tree:
        raise AssertionError(f"the output has the structure {given_tree}, not {wanted_tree}")
    for (path, value), (_, reference) in zip(given, wanted, strict=True):
        where = f"output{pytree.keystr(path)}"
        if not isinstance(reference, Tensor) or not isinstance(value, Tensor):
            if type(value) is not type(reference) or value != reference:
                raise AssertionError(f"{where} is {value!r}, not {reference!r}")
            continue
        if value.dtype != reference.dtype or value.shape != reference.shape:
            raise AssertionError(
                f"{where} is {value.dtype} {list(value.shape)}, not {reference.dtype} {list(reference.shape)}"
            )
        if not (reference.is_floating_point() or reference.is_complex()):
            if not torch.equal(value, reference):
                raise AssertionError(f"{where} is not equal: {int((value != reference).sum())} entries differ")
            continue
        error = _relative_error(value, reference)
        if not error <= tolerance:
            raise AssertionError(f"{where} differs by {error:.3g} (relative L2), more than {tolerance:.3g}")


def _relative_error(value: Tensor, reference: Tensor) -> float:
    wide = torch.complex128 if reference.is_complex() else torch.float64
    a, b = value.to(wide), reference.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())  # equal infinities, and NaN where NaN was
    difference = torch.where(same, torch.zeros_like(a), a - b).abs().square().sum().item()
    size = torch.where(same & ~b.isfinite(), torch.zeros_like(b), b).abs().square().sum().item()
    if difference == 0:
        return 0.0
    return math.sqrt(difference / size) if size > 0 else math.inf


def graph_text(gm: GraphModule) -> str:
    """A graph as compact, stable text for golden tests, a line per node in graph order.

    Operators are named without ``aten.`` and ``.default``; a parameter or buffer is written by its FQN, an inserted
    module as ``module[FQN]``.

    Example::

        %conv_weight = get[conv.weight]
        %x = input
        %conv2d = conv2d(%x, %conv_weight)
        %mul = mul.Tensor(%conv2d, 2.0)
        return (%mul,)
    """
    return "\n".join(_line(node) for node in gm.graph.nodes)


def _line(node: Node) -> str:
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    if node.op == "placeholder":
        return f"%{node.name} = input"
    if node.op == "get_attr":
        return f"%{node.name} = get[{node.target}]"
    arguments = [_text(argument) for argument in node.args]
    arguments += [f"{key}={_text(value)}" for key, value in node.kwargs.items()]
    called = f"module[{node.target}]" if node.op == "call_module" else _operator(node.target)
    return f"%{node.name} = {called}({', '.join(arguments)})"


def _operator(target: object) -> str:
    if isinstance(target, OpOverload):
        return str(target).removeprefix("aten.").removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _text(argument: object) -> str:
    if isinstance(argument, Node):
        return f"%{argument.name}"
    if isinstance(argument, tuple):
        inner = ", ".join(_text(item) for item in argument)
        return f"({inner},)" if len(argument) == 1 else f"({inner})"
    if isinstance(argument, list):
        return f"[{', '.join(_text(item) for item in argument)}]"
    if isinstance(argument, dict):
        return "{" + ", ".join(f"{key}: {_text(value)}" for key, value in argument.items()) + "}"
    if isinstance(argument, torch.dtype):
        return str(argument).removeprefix("torch.")
    return repr(argument)
