"""Which parameters refinement changes: factors, biases and norms, told by what the program does with them.

In a graph, a parameter is one of these if some node reads it, perhaps cast or in another shape,

- as the argument ``bias`` of an operator (linear, convolution, norm, ...), as what ``addmm`` adds to, or as one of the
  biases of a recurrent operator,
- as the argument ``weight`` of an operator that is a norm,
- as a vector that is added to a product of matrices or a convolution, or
- as a vector that is multiplied onto, or added to, something normalised: what ``rsqrt`` was multiplied onto, or what
  was divided by a root or a vector norm (an RMS norm in its parts), perhaps with other such vectors in between.

In a module tree, whose operators cannot be seen, a parameter is one of these if it is a parameter of one of torch's
norms, a vector of another module with "norm" in the name of its class, or a vector with "bias" in its own name.

Everything else stays: matrices that are not factored, embeddings, the weight of a PReLU, parameters of the user's own.
"""

from __future__ import annotations

import operator

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.nn.modules import batchnorm, instancenorm, normalization

from lowrank_fx.graph_operators import schema_name
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.modules import FACTORS
from lowrank_fx.program import Program

_SAME = frozenset(
    f"aten::{name}"
    for name in (
        *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as"),
        *("permute", "transpose", "movedim", "slice", "select", "narrow", "chunk", "split", "split_with_sizes"),
        *("to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach"),
    )
)
"""Operators behind which a parameter, or an activation, is still itself."""

_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        *("linear", "mm", "matmul", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d", "convolution"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    )
)

_RECURRENT = ("aten::lstm", "aten::gru", "aten::rnn_")

_TORCH_NORMS = (
    batchnorm._NormBase,
    instancenorm._InstanceNorm,
    normalization.LayerNorm,
    normalization.GroupNorm,
    nn.RMSNorm,
)


def trained(program: Program) -> dict[str, nn.Parameter]:
    """The parameters of a factored program that refinement changes, by name: factors, biases, parameters of norms."""
    roles = _in_graph(program.module) if isinstance(program, GraphProgram) else _in_tree(program.module)
    return {
        name: parameter
        for name, parameter in program.module.named_parameters()
        if parameter.is_floating_point() and parameter.numel() and (is_factor(name) or id(parameter) in roles)
    }


def is_factor(name: str) -> bool:
    """Whether a parameter of this name is a factor."""
    return name.endswith(FACTORS)


def _is_vector(parameter: Tensor) -> bool:
    return parameter.dim() > 0 and parameter.numel() == max(parameter.shape)


# ---- a module tree ---------------------------------------------------------------------------------------------------


def _in_tree(tree: nn.Module) -> set[int]:
    """The ``id`` of every bias and parameter of a norm."""
    found: set[int] = set()
    for module in tree.modules():
        norm = any("norm" in kind.__name__.lower() for kind in type(module).__mro__)
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _TORCH_NORMS) or (_is_vector(parameter) and (norm or "bias" in name)):
                found.add(id(parameter))
    return found


# ---- a graph ---------------------------------------------------------------------------------------------------------


def _in_graph(gm: GraphModule) -> set[int]:
    """The ``id`` of every bias and parameter of a norm."""
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for node in gm.graph.nodes:
        parameter = parameters.get(str(node.target)) if node.op == "get_attr" else None
        if parameter is not None and _has_role(node, parameter):
            found.add(id(parameter))
    return found


def _has_role(node: Node, parameter: Tensor) -> bool:
    """Whether one of the readers of a parameter takes it as a bias or as a parameter of a norm."""
    return any(
        _has_role(user, parameter) if _is_same(user) and user.args[0] is node else _reads_role(user, node, parameter)
        for user in node.users
    )


def _reads_role(user: Node, node: Node, parameter: Tensor) -> bool:
    if not isinstance(user.target, OpOverload):
        return False
    name = schema_name(user)
    arguments = [argument.name for argument in user.target._schema.arguments]
    roles = {role for role, given in zip(arguments, user.args, strict=False) if given is node}
    roles |= {role for role, given in user.kwargs.items() if given is node}
    if "bias" in roles or ("weight" in roles and "norm" in name and "weight_norm" not in name):
        return True
    if name in ("aten::addmm", "aten::baddbmm"):
        return "self" in roles
    if name.startswith(_RECURRENT):  # which takes its weights and biases as one list
        return parameter.dim() == 1
    if not _is_vector(parameter) or name not in ("aten::add", "aten::add_", "aten::mul", "aten::mul_"):
        return False
    others = [given for given in user.args[:2] if given is not node]
    other = _origin(others[0]) if len(others) == 1 else None
    if other is None:
        return False
    added = name.startswith("aten::add")
    return _is_normalised(other) or (added and parameter.dim() == 1 and schema_name(other) in _PRODUCTS)


def _is_normalised(node: Node | None) -> bool:
    """Whether a value is a reciprocal root, or was multiplied by one, or divided by a root; vectors may follow."""
    node = _origin(node)
    if node is None or _is_reciprocal_root(node):
        return node is not None
    name, given = schema_name(node), node.args[:2]
    if name in ("aten::mul", "aten::mul_") and any(_is_reciprocal_root(_origin(each)) for each in given):
        return True
    if name in ("aten::div", "aten::div_") and _is_root(given[1]):
        return True
    if name.split("::")[-1].rstrip("_") not in ("mul", "div", "add", "sub"):
        return False
    rest = [each for each in map(_origin, given) if each is not None and each.op != "get_attr"]
    return len(rest) == 1 and _is_normalised(rest[0])


def _is_reciprocal_root(node: Node | None) -> bool:
    if node is None:
        return False
    name = schema_name(node)
    if name == "aten::pow":
        return bool(node.args[1] == -0.5)
    return name == "aten::rsqrt" or (name == "aten::reciprocal" and _is_root(node.args[0]))


def _is_root(value: object) -> bool:
    """Whether a value is a square root or the norm of a vector, kept from zero or not."""
    node = _origin(value)
    while node is not None and schema_name(node) in ("aten::clamp", "aten::clamp_min", "aten::add"):
        node = _origin(node.args[0])
    return node is not None and schema_name(node) in ("aten::sqrt", "aten::linalg_vector_norm", "aten::norm")


def _is_same(node: Node) -> bool:
    return node.target is operator.getitem or schema_name(node) in _SAME


def _origin(value: object) -> Node | None:
    """The node that a value comes from, in front of casts and other shapes; None for a number."""
    while isinstance(value, Node) and _is_same(value):
        value = value.args[0]
    return value if isinstance(value, Node) else None
