"""CLEAN-UP: batch normalisation in inference is part of the convolution in front of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.edit import free_name, parameter_node, replace_parameter, set_parameter, users_by_tensor
from lowrank_fx.passes.verify import attr_tensor

aten = torch.ops.aten

_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


class FoldBatchNorm(Pass):
    """Fold batch normalisation into the convolution in front of it.

    Before::

        %conv2d = conv2d(%x, %weight, %bias)
        %batch_norm = batch_norm(%conv2d, %gamma, %beta, %mean, %var, False, 0.1, eps, True)

    After::

        %conv2d = conv2d(%x, %weight, %bias)        # new values under the convolution's own names

    Formula, per output channel (Jacob et al., arXiv:1712.05877, section 3.2)::

        s = gamma / sqrt(var + eps);  weight' = weight * s;  bias' = (bias - mean) * s + beta

    computed in float64 and stored in the weight's dtype. A missing bias or beta counts as 0, a missing gamma as 1; a
    convolution without a bias gets one. The new values are new parameters: the model that was captured keeps its own.

    Left alone when it normalises something else than a convolution's output, or that of a transposed one; when it uses
    the batch's statistics (training, or no running ones); when something else reads the convolution's output, its
    weight or its bias (a tied weight has one value, not one per normalisation); when its saved statistics are used;
    when weight, statistics and output are not all of one dtype; when one of the tensors is computed inside the graph or
    written to.
    """

    name = "fold-batchnorm"

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Fold every batch normalisation that can be folded."""
        changes: list[str] = []
        refusals: list[Refusal] = []
        users = users_by_tensor(gm)
        for node in list(gm.graph.nodes):
            if node.target not in (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default):
                continue
            try:
                fold = _Fold(gm, node, users)
            except _NotFoldableError as reason:
                refusals.append(Refusal(node.name, str(reason)))
                continue
            if not budget.take():
                refusals.append(budget.refusal(node))
                continue
            changes.append(fold.apply())
        return PassResult(tuple(changes), tuple(refusals))


class _NotFoldableError(Exception):
    """The reason why a batch normalisation is not folded."""


class _Fold:
    """One batch normalisation with its convolution, checked; nothing is changed before :meth:`apply`."""

    def __init__(self, gm: GraphModule, norm: Node, users: dict[int, tuple[Node, ...]]) -> None:
        self.gm, self.norm, self.users = gm, norm, users
        native = norm.target is aten._native_batch_norm_legit_no_training.default
        names = [argument.name for argument in norm.target._schema.arguments]  # type: ignore[union-attr]
        given = dict(zip(names, norm.args, strict=False)) | dict(norm.kwargs)
        if given.get("training"):
            raise _NotFoldableError("it normalises by the statistics of the batch (training=True)")
        if given["running_mean"] is None or given["running_var"] is None:
            raise _NotFoldableError("it has no running statistics, so it normalises by those of the batch")
        self.eps = float(given["eps"])
        self.outputs = list(norm.users) if native else [norm]
        if native and any(user.args[1] != 0 for user in norm.users):
            raise _NotFoldableError("its saved statistics are used")

        self.conv = given["input"]
        self._check_convolution()
        self.mean = self._tensor("running mean", given["running_mean"])
        self.var = self._tensor("running variance", given["running_var"])
        self.gamma = self._tensor("weight", given["weight"])
        self.beta = self._tensor("bias", given["bias"])
        self.mean_name = str(given["running_mean"].target)

        self.weight_node = self.conv.args[1]
        self.bias_node = self.conv.args[2] if len(self.conv.args) > 2 else self.conv.kwargs.get("bias")
        self.weight = self._own("weight", self.weight_node)
        self.bias = None if self.bias_node is None else self._own("bias", self.bias_node)
        self._check_dtypes()

    def _check_convolution(self) -> None:
        conv = self.conv
        if conv.target in _TRANSPOSED:
            raise _NotFoldableError(f"its input {conv.name} is a transposed convolution")
        if conv.target not in _CONVOLUTIONS:
            raise _NotFoldableError(f"its input {conv.name} is not a convolution's output")
        others = [user.name for user in conv.users if user is not self.norm]
        if others:
            raise _NotFoldableError(f"the output of {conv.name} is also used by {', '.join(others)}")

    def _tensor(self, role: str, node: Node | None) -> Tensor | None:
        """The tensor that a node reads, or None for an argument that was not given."""
        if node is None:
            return None
        if node.op != "get_attr":
            raise _NotFoldableError(f"its {role} is computed inside the graph")
        tensor = attr_tensor(self.gm, node)
        if any(isinstance(user.target, OpOverload) and user.target._schema.is_mutable for user in node.users):
            raise _NotFoldableError(f"its {role} {node.target} is written to by the graph")
        return tensor

    def _own(self, role: str, node: Node) -> Tensor:
        """The convolution's weight or bias, which nothing else may read."""
        if node.op != "get_attr":
            raise _NotFoldableError(f"the {role} of {self.conv.name} is computed inside the graph")
        tensor = attr_tensor(self.gm, node)
        others = [user.name for user in self.users[id(tensor)] if user is not self.conv]
        if others:
            raise _NotFoldableError(f"the {role} {node.target} is shared with {', '.join(others)}")
        return tensor

    def _check_dtypes(self) -> None:
        tensors = {
            "weight": self.weight,
            "bias": self.bias,
            "scale": self.gamma,
            "shift": self.beta,
            "mean": self.mean,
            "variance": self.var,
            "output": self.outputs[0].meta["val"] if self.outputs else None,
        }
        dtypes = {role: tensor.dtype for role, tensor in tensors.items() if tensor is not None}
        if len(set(dtypes.values())) > 1 or not self.weight.is_floating_point():
            listed = ", ".join(f"{role} {str(dtype).removeprefix('torch.')}" for role, dtype in dtypes.items())
            raise _NotFoldableError(f"its tensors are not of one floating dtype ({listed})")

    @torch.no_grad()
    def apply(self) -> str:
        """Rewrite the graph; the line that says what was done."""
        assert self.mean is not None
        assert self.var is not None
        scale = (self.var.double() + self.eps).rsqrt()
        if self.gamma is not None:
            scale = scale * self.gamma.double()
        shift = -self.mean.double() if self.bias is None else self.bias.double() - self.mean.double()
        bias = shift * scale if self.beta is None else shift * scale + self.beta.double()
        weight = self.weight.double() * scale.reshape(-1, *[1] * (self.weight.dim() - 1))

        name = str(self.weight_node.target)
        dtype = self.weight.dtype
        new = [replace_parameter(self.gm, name, weight.to(dtype), _trainable(self.weight, self.gamma))]
        owner, _, leaf = name.rpartition(".")
        learns = _trainable(self.bias, self.beta, self.gamma)
        if self.bias_node is not None:
            new.append(replace_parameter(self.gm, str(self.bias_node.target), bias.to(dtype), learns))
        else:
            own = "bias" if leaf == "weight" else f"{leaf}_bias"
            target = free_name(self.gm, f"{owner}.{own}" if owner else own)
            new.append(set_parameter(self.gm, target, bias.to(dtype), learns))
            self.conv.args = (*self.conv.args[:2], parameter_node(self.gm, target, self.conv), *self.conv.args[3:])
            self.conv.kwargs = {key: value for key, value in self.conv.kwargs.items() if key != "bias"}
        for output in self.outputs:
            output.replace_all_uses_with(self.conv)
            self.gm.graph.erase_node(output)
        if self.norm not in self.outputs:
            self.gm.graph.erase_node(self.norm)
        # What is normalised twice is folded twice, so the second time must find the new tensors.
        self.users.update((id(parameter), (self.conv,)) for parameter in new)
        return f"{self.mean_name.rpartition('.')[0] or self.norm.name} folded into {owner or name}"


def _trainable(*sources: Tensor | None) -> bool:
    return any(source is not None and source.requires_grad for source in sources)
