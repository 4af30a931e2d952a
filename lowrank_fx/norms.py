"""Statistics of batch normalisation in a factored model, estimated again.

A batch norm that could not be folded into a convolution (it comes first, or behind a sum) normalises by a running mean
and variance that belong to the original's activations. In the factored model the same layer sees others. With m, v the
statistics of its input over calibration batches, of the original (0) and of the factored model (1),

    mean' = mean + (m_1 - m_0),    var' = var * v_1 / v_0

are what training would have recorded there: the difference on the same batches, on top of what many more batches gave.
The layers are visited in graph order, so that each one sees what the corrected ones before it give; of all batches only
what crosses from one to the next is held, within the memory of ``closed_loop.py``. Compare M. Nagel,
M. van Baalen, T. Blankevoort, M. Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction",
ICCV 2019, section 4.2, which corrects means alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowrank_fx.batches import Call
from lowrank_fx.closed_loop import affordable_at
from lowrank_fx.graph_program import substitutes
from lowrank_fx.program import Factored
from lowrank_fx.walk import Run, Walk

aten = torch.ops.aten

MIN_SHARE = 1e-6
"""A channel whose variance on the batches is below this share of its running variance keeps that."""

_NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)


def reestimate(gm: GraphModule, factored: Factored, calls: Sequence[Call]) -> dict[str, Tensor]:
    """The running statistics of every batch norm in a factored model.

    Args:
        gm: the clean captured graph.
        factored: a site and its factors, by site name.
        calls: inputs of calibration batches, at least one; the first that fit ``closed_loop.MEMORY`` are used.

    Returns:
        New values of buffers by fully qualified name, in the buffers' dtype. A buffer that several layers read keeps
        its value, and so do those of layers that factoring does not reach.
    """
    walk = Walk(gm)
    changes: dict[str, Tensor] = {}
    norms = [(position, buffers) for position, node in enumerate(walk.nodes) if (buffers := _buffers(walk, node))]
    if not norms:
        return changes
    values: dict[str, Tensor] = {}
    for site, factors in factored.values():
        values.update(substitutes(gm, site, factors))
    with torch.no_grad():
        taken = affordable_at(walk, [position for position, _ in norms], calls)
        originals = [walk.run(call) for call in taken]
        runs = [walk.run(call) for call in taken]
        for run in runs:
            run.exchange(values)
        for position, buffers in norms:
            node = walk.nodes[position]
            for run in (*originals, *runs):
                while run.position < position:
                    run.compute()
                    run.move()
            (value,) = node.all_input_nodes[:1]
            before, after = (_statistics([run.values[value] for run in each]) for each in (originals, runs))
            if all(torch.equal(one, other) for one, other in zip(before, after, strict=True)):
                continue
            mean, var = (walk.compute(buffer, {}) for buffer in buffers)
            seen = before[1] > MIN_SHARE * var.double()
            ratio = torch.where(seen, after[1] / torch.where(seen, before[1], 1.0), 1.0)
            new = (mean.double() + after[0] - before[0]).to(mean.dtype), (var.double() * ratio).to(var.dtype)
            for buffer, value in zip(buffers, new, strict=True):
                changes[str(buffer.target)] = value
                for run in runs:
                    _exchange(run, buffer, value)
    return changes


def _buffers(walk: Walk, node: Node) -> tuple[Node, Node] | None:
    """The nodes that read running mean and variance of a batch norm, where nothing else reads them."""
    if node.target not in _NORMS:
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    mean, var = given["running_mean"], given["running_var"]
    if given.get("training") or not isinstance(mean, Node) or not isinstance(var, Node):
        return None
    for buffer in (mean, var):
        readers = [user for reader in walk.nodes if reader.target == buffer.target for user in reader.users]
        if buffer.op != "get_attr" or len(readers) != 1:
            return None
    return mean, var


def _statistics(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel over several activations ``[batch, channels, ...]``, float64."""
    count = sum(value.numel() // value.shape[1] for value in values)
    axes = [[axis for axis in range(value.dim()) if axis != 1] for value in values]
    mean = sum(value.double().sum(axis) for value, axis in zip(values, axes, strict=True)) / count
    assert isinstance(mean, Tensor)
    spread = sum(
        (value.double() - mean.view(1, -1, *[1] * (value.dim() - 2))).square().sum(axis)
        for value, axis in zip(values, axes, strict=True)
    )
    assert isinstance(spread, Tensor)
    return mean, spread / count


def _exchange(run: Run, reader: Node, value: Tensor) -> None:
    run.exchanged[reader] = value
    if reader in run.values:
        run.values[reader] = value
