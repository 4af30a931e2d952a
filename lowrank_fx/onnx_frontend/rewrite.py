"""REWRITE for ONNX: the nodes of factored sites become chains of the same operator; everything else stays as it is.

The message itself is edited. onnxscript's rewriter and onnx-ir, on which it rests, take a model apart and build it
anew: what comes out lacks sparse initializers, training information and quantisation annotations, and a node of the
domain ``ai.onnx`` comes back in another one (onnx-ir 1.1). Here every message that no site asks to change is copied
whole.

Only MatMul, Gemm and Conv are written, as they stand in every version of the standard since 1 (Gemm with its own
attributes), so a model keeps its opset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from lowrank_fx.forms import Factors
from lowrank_fx.forms.geometry import owners
from lowrank_fx.onnx_frontend.model import OnnxModel, attributes_of, constant_of
from lowrank_fx.onnx_frontend.sites import patch_of
from lowrank_fx.program import Factored
from lowrank_fx.sites import Site

_GEOMETRY = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def substitutes(model: OnnxModel, site: Site, factors: Factors, *, exact: bool = True) -> dict[str, Tensor]:
    """Stand-ins for a site's weight and biases, by name: the dense product of its factors.

    Args:
        model: the model.
        site: the site.
        factors: its factors.
        exact: whether they are multiplied in float64, as weights that stay are; measured errors do not need it.
    """
    dense = factors.dense_matrix().to(factors.factor_in.dtype) if exact else factors.stand_in()
    return {site.weight: site.unmatrix(dense), **shifted(model, site, factors)}


def shifted(model: OnnxModel, site: Site, factors: Factors) -> dict[str, Tensor]:
    """A site's biases as its factors want them, by name, in their own shapes and dtypes."""
    made: dict[str, Tensor] = {}
    if factors.shift is not None:
        for name in site.biases:
            bias = model.tensor(name)
            made[name] = (bias.double() + factors.shift.cpu().view_as(bias)).to(bias.dtype)
    return made


def factorized(model: OnnxModel, factored: Factored) -> OnnxModel:
    """A model with the given sites factored.

    Before::

        y = MatMul(x, W)                            # or Gemm(x, W, bias), Conv(x, W, bias)

    After::

        inner = MatMul(x, FACTOR_IN)                # in front of a Gemm too
        y = MatMul(inner, FACTOR_OUT)               # Gemm with its own attributes and bias; Conv with its share of them

    A convolution's geometry goes to the factor whose kernel spans a dimension, else to the first. The last node keeps
    the name, the metadata and the output of the one it replaces. An Add behind a MatMul stays; its constant changes.

    Args:
        model: the model; it stays as it is.
        factored: a site and its factors, by site name.
    """
    changes = _Changes(model)
    for site, factors in factored.values():
        changes.factor(site, factors)
    return changes.applied()


def with_values(model: OnnxModel, values: Mapping[str, Tensor]) -> OnnxModel:
    """A model with other values of some of its constants.

    Args:
        model: the model; it stays as it is.
        values: by name, in the constants' own shapes and dtypes.
    """
    changes = _Changes(model)
    changes.values.update(values)
    return changes.applied()


@dataclass
class _Changes:
    """What is to change in a model.

    Attributes:
        model: the model.
        values: new values of constants, by name.
        stored: by the name of a weight that goes, the initializers that come.
        nodes: by the output of a node that goes, the nodes that come.
    """

    model: OnnxModel
    values: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, list[TensorProto]] = field(default_factory=dict)
    nodes: dict[str, list[NodeProto]] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def factor(self, site: Site, factors: Factors) -> None:
        """Replace every call of a site."""
        self.values.update(shifted(self.model, site, factors))
        tensors = _stored(site, factors)
        names = {leaf: self._fresh(f"{site.name}.{leaf}") for leaf in tensors}
        self.stored[site.weight] = [_proto(tensor, names[leaf]) for leaf, tensor in tensors.items()]
        for call in site.calls:
            node = self.model.producers[call.node]
            build = self._convolutions if node.op_type == "Conv" else self._products
            self.nodes[call.node] = list(build(node, names, tensors))

    def _products(
        self, node: NodeProto, names: Mapping[str, str], tensors: Mapping[str, Tensor]
    ) -> Iterator[NodeProto]:
        inner = self._inner(node, "factor_in", "MatMul", [node.input[0], names["factor_in"]])
        yield inner
        last = NodeProto()
        last.CopyFrom(node)
        last.input[0], last.input[1] = inner.output[0], names["factor_out"]
        yield last

    def _convolutions(
        self, node: NodeProto, names: Mapping[str, str], tensors: Mapping[str, Tensor]
    ) -> Iterator[NodeProto]:
        source = node.input[0]
        for leaf, options in zip(tensors, conv_options(node, list(tensors.values())), strict=True):
            if leaf == "factor_out":
                made = NodeProto()
                made.CopyFrom(node)
                made.input[0], made.input[1] = source, names[leaf]
                kept = [attribute for attribute in node.attribute if attribute.name not in _GEOMETRY]
                del made.attribute[:]
                made.attribute.extend(kept)
            else:
                made = self._inner(node, leaf, "Conv", [source, names[leaf]])
                source = made.output[0]
            made.attribute.extend(helper.make_attribute(name, value) for name, value in options.items())
            yield made

    def _inner(self, node: NodeProto, leaf: str, operator: str, inputs: Sequence[str]) -> NodeProto:
        output = self._fresh(f"{node.output[0]}.{leaf}")
        made = helper.make_node(operator, inputs, [output], domain=node.domain)
        if node.name:
            made.name = f"{node.name}.{leaf}"
        made.metadata_props.extend(node.metadata_props)
        return made

    def _fresh(self, name: str) -> str:
        """A name that no value of the model has."""
        if not self._taken:
            model = self.model
            graphs = [model.graph, *model.inner_graphs]
            self._taken = {name for graph in graphs for node in graph.node for name in (*node.input, *node.output)}
            self._taken |= {each.name for graph in graphs for each in (*graph.input, *graph.initializer)}
        made, number = name, 1
        while made in self._taken:
            number += 1
            made = f"{name}.{number}"
        self._taken.add(made)
        return made

    def applied(self) -> OnnxModel:
        """The changed model."""
        made = ModelProto()
        made.CopyFrom(self.model.proto)
        graph = made.graph
        initializers, nodes = list(graph.initializer), list(graph.node)
        del graph.initializer[:]
        for tensor in initializers:
            graph.initializer.extend(self.stored.get(tensor.name, [tensor]))
        del graph.node[:]
        for node in nodes:
            name = node.output[0] if node.output else ""
            if name in self.stored:  # a Constant node whose tensor is no longer read
                graph.initializer.extend(self.stored[name])
            else:
                graph.node.extend(self.nodes.get(name, [node]))
        holders = [(tensor.name, tensor) for tensor in graph.initializer]
        holders += [(node.output[0], tensor) for node in graph.node if (tensor := constant_of(node)) is not None]
        for name, tensor in holders:
            if name in self.values:
                _write(self.values[name], tensor)
        self._describe(graph.value_info, graph.input)
        external = {name for name in self.model.external if name not in self.stored}
        moved = {each.name for name in self.model.external & self.stored.keys() for each in self.stored[name]}
        return OnnxModel(made, frozenset(external | moved))

    def _describe(self, infos: Any, inputs: Any) -> None:
        """Values that are gone are no longer described; before IR version 4 every initializer is listed as an input."""
        for listed in (infos, inputs):
            kept: list[ValueInfoProto] = []
            for info in listed:
                if info.name not in self.stored:
                    kept.append(info)
                elif listed is inputs:
                    kept += [
                        helper.make_tensor_value_info(each.name, each.data_type, list(each.dims))
                        for each in self.stored[info.name]
                    ]
            del listed[:]
            listed.extend(kept)


def conv_options(node: NodeProto, factors: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The attributes of every factor's convolution.

    Args:
        node: the Conv that they replace.
        factors: kernels ``[out, in, *kernel]`` in the order of their application.
    """
    places = owners(factors)
    given = attributes_of(node)
    spans = [tuple(int(size) for size in factor.shape[2:]) for factor in factors]
    kernel = tuple(spans[place][axis] for axis, place in enumerate(places))
    patch = patch_of(given, kernel)
    assert patch is not None
    made = []
    for number, span in enumerate(spans):
        own = [place == number for place in places]
        sides = [side if mine else (0, 0) for side, mine in zip(patch.padding, own, strict=True)]
        made.append(
            {
                "dilations": [value if mine else 1 for value, mine in zip(patch.dilation, own, strict=True)],
                "group": int(given.get("group", 1)),
                "kernel_shape": list(span),
                "pads": [first for first, _ in sides] + [last for _, last in sides],
                "strides": [value if mine else 1 for value, mine in zip(patch.stride, own, strict=True)],
            }
        )
    return made


def _stored(site: Site, factors: Factors) -> dict[str, Tensor]:
    """The factors as the nodes read them."""
    tensors = {leaf: tensor.detach().cpu() for leaf, tensor in factors.tensors.items()}
    if site.kind == "linear":
        tensors["factor_in"] = tensors["factor_in"].t()  # always behind a MatMul, which takes [in, rank]
        if site.transposed:
            tensors["factor_out"] = tensors["factor_out"].t()
    return tensors


def _proto(tensor: Tensor, name: str) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(tensor.detach().cpu().numpy()), name)


def _write(tensor: Tensor, holder: TensorProto) -> None:
    """Change a tensor's values, and leave its documentation."""
    made = _proto(tensor, holder.name)
    made.doc_string = holder.doc_string
    made.metadata_props.extend(holder.metadata_props)
    holder.CopyFrom(made)
