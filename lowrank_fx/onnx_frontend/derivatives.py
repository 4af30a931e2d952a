"""Derivatives of an ONNX model: what lies behind its sites, computed once more by torch.

onnxruntime gives values and no derivatives. Behind the sites, and only there, torch evaluates the same operators; what
does not depend on a site (shapes, indices, masks) keeps the value that onnxruntime gave it. An operator that
``operators.py`` lacks has no derivative, and outputs that differ from onnxruntime's mean that one was read wrongly; in
either case there are none, and directions are chosen by activations alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from onnx import NodeProto
from torch import Tensor

from lowrank_fx.onnx_frontend.model import DOMAINS, FLOATS, OnnxModel, attributes_of, describe_node
from lowrank_fx.onnx_frontend.operators import OPERATORS

CLOSE = 1e-2
"""How far, relatively, outputs may be from onnxruntime's: float16 is evaluated in float32."""

_NO_DERIVATIVE = frozenset(
    ("Shape", "Size", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "IsNaN", "IsInf")
) | {"ArgMax", "ArgMin", "NonZero", "Sign", "Floor", "Ceil", "Round", "OneHot"}
"""Operators whose outputs stay as onnxruntime gave them."""


class Derivatives:
    """The part of a model that depends on some of its values.

    Args:
        model: the model.
        starts: outputs of nodes.

    Attributes:
        watched: the values that have to be known to evaluate it.
        missing: operators of it that have no derivative here.
    """

    def __init__(self, model: OnnxModel, starts: Sequence[str]) -> None:
        self.model = model
        self.starts = frozenset(starts)
        active: set[str] = set()
        self.nodes: list[NodeProto] = []
        self._constants: dict[str, Tensor] = {}
        for node in model.nodes:
            begins = bool(self.starts.intersection(node.output))
            if begins or (active.intersection(node.input) and not _is_cut(node)):
                self.nodes.append(node)
                active.update(filter(None, node.output))
        needed = dict.fromkeys(name for node in self.nodes for name in node.input if name)
        self.watched = [name for name in needed if name not in active and name not in model.constants]
        self.missing = tuple(
            dict.fromkeys(
                ".".join(filter(None, (node.domain, node.op_type)))
                for node in self.nodes
                if node.domain not in DOMAINS or node.op_type not in OPERATORS
            )
        )
        opsets = {entry.domain: entry.version for entry in model.proto.opset_import}
        self.opset = next((opsets[domain] for domain in DOMAINS if domain in opsets), 1)

    def evaluate(
        self, known: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Evaluate it, recording gradients where the caller has them recorded.

        Args:
            known: the ``watched`` values.
            outputs: of the model, as onnxruntime gave them.

        Returns:
            The outputs, and the values at the starts; both in float32 where they are floating.

        Raises:
            RuntimeError: an operator has no derivative, or the outputs are not those of onnxruntime.
        """
        if self.missing:
            raise RuntimeError(f"no derivative of {', '.join(self.missing)}")
        values: dict[str, Any] = {name: _promoted(value) for name, value in known.items()}
        for node in self.nodes:
            for name in node.input:
                if name in self.model.constants and name not in values:
                    values[name] = self._constant(name)
            options = {**attributes_of(node), "opset": self.opset, "outputs": len(node.output)}
            try:
                found = OPERATORS[node.op_type]([values[name] if name else None for name in node.input], options)
            except Exception as error:  # whatever a use that the table does not foresee may raise
                raise RuntimeError(f"no derivative of the {describe_node(node)}: {error}") from error
            for name, value in zip(node.output, found if isinstance(found, tuple) else (found,), strict=False):
                if name in self.starts and torch.is_grad_enabled() and not value.requires_grad:
                    value.requires_grad_()
                values[name] = value
        made = {name: values.get(name, value) for name, value in outputs.items()}
        for name, value in outputs.items():
            if name in values and not _is_close(values[name].detach(), value):
                raise RuntimeError(f"the output {name!r} is not that of onnxruntime")
        return made, {name: values[name] for name in self.starts}

    def _constant(self, name: str) -> Tensor:
        if name not in self._constants:
            try:
                self._constants[name] = _promoted(self.model.tensor(name))
            except TypeError as error:  # NumPy has it, torch has not: four bits, bfloat16
                raise RuntimeError(f"no derivative behind the constant {name!r}: {error}") from error
        return self._constants[name]


def _is_cut(node: NodeProto) -> bool:
    if node.domain not in DOMAINS:
        return False
    return node.op_type in _NO_DERIVATIVE or (node.op_type == "Cast" and attributes_of(node)["to"] not in FLOATS)


def _promoted(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_close(value: Tensor, reference: Any) -> bool:
    if not isinstance(reference, Tensor) or value.shape != reference.shape:
        return False
    wanted = reference.double()
    finite = wanted.isfinite()
    distance = torch.where(finite, value.double() - wanted, 0).norm()
    return bool(distance <= CLOSE * torch.where(finite, wanted, 0).norm())
