"""How strongly the model's output reacts to each site's output: second moments of output gradients.

For a site with the output rows y_1 ... y_n, let g_i be the gradient of <v, outputs> with respect to y_i, v a vector of
independent standard normal numbers over all floating outputs (padding left out, as errors leave it out). Then

    Gamma = sum over i of g_i g_i^T,    E_v[g_i g_i^T] = J_i^T J_i

with J_i the Jacobian of the outputs with respect to y_i: a Hutchinson estimate of the Gauss-Newton matrix of the
squared output error, the one that effects measure. A row that moves by a small e_i adds about e_i^T J_i^T J_i e_i to
the squared error, if the rows' errors do not meet.

It is a proxy: it orders directions within a layer (``double_sided.py``); what they are worth is measured. That is why
it stays the moment of the L2 error where the user asked for another loss: effects are measured by that loss, and the
basis comes back only where it does better by it.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_fx._ambient import recording, seeded
from lowrank_fx._progress import Progress
from lowrank_fx.batches import Call
from lowrank_fx.calibration import Calibration
from lowrank_fx.compare import floating_outputs, without_padding
from lowrank_fx.effort import EFFORTS, Effort
from lowrank_fx.errors import CalibrationError
from lowrank_fx.grouped_sketch import Sketch, make_sketch
from lowrank_fx.program import Outputs, Program
from lowrank_fx.sites import Site, SiteTable
from lowrank_fx.sketch import FrequentDirections

GRADIENT_FLOPS = 5.0e11
"""Work allowed for gradients; it sets how many calibration batches are used."""

GRADIENT_ROWS = 16384
"""Rows of a site's output, evenly spaced, whose gradients are kept; images have very many."""

EXACT_BYTES = 256 << 20
"""Memory that exact sums of all gradients may take; beyond it wide outputs are sketched."""

SKETCH_SIZE = 256
"""Rows of the Frequent Directions sketch of a wide output's gradients; up to twice as wide they are summed exactly."""

MOST_SAID = 160
"""Characters of an error's message that are told."""


class OutputGradients(NamedTuple):
    """What gradients say of the sites.

    Attributes:
        sketches: by site name, of the gradients' rows ``[out_features]`` (the groups of a site beside each other);
            ``parts[j].gram(centered=False)`` is Gamma of group j. Sites that no gradient reaches (their output is
            rounded or compared behind them) have none.
        refused: why there are none at all; empty where there are some, or no site.
    """

    sketches: Mapping[str, Sketch]
    refused: str = ""


def output_gradients(
    program: Program,
    table: SiteTable,
    calibration: Calibration,
    effort: Effort = EFFORTS["high"],
    progress: bool = True,
) -> OutputGradients:
    """The second moments of the gradients at every site's output, summed over calibration batches.

    Args:
        program: the captured model.
        table: its sites.
        calibration: the inputs of its calibration batches are used, as many as ``GRADIENT_FLOPS`` allows.
        effort: how many samples are enough, and how many random vectors a batch is run with at most.
        progress: show a progress bar for work over two seconds.
    """
    sketches: dict[str, Sketch] = {}
    broken: set[str] = set()
    sites = {call.node: site for site in table.sites for call in site.calls}
    exact = sum(8 * site.out_features**2 // site.groups for site in table.sites)
    widest = 2 * SKETCH_SIZE if exact > EXACT_BYTES else max((site.out_features for site in table.sites), default=0)
    run = program.probed(list(sites))
    calls, probes = _affordable(calibration, effort)
    generator = torch.Generator("cpu").manual_seed(calibration.seed)
    with Progress("gradients", len(calls), progress) as bar:
        for call in calls:
            try:
                probed = _gradients_of(program, run, call, generator, probes)
            except RuntimeError as error:
                return OutputGradients({}, _cause(error))
            for gradients in probed:
                for node, gradient in gradients.items():
                    site = sites[node]
                    rows = output_rows(site, gradient)
                    rows = rows[rows.any(1)]  # padding has none
                    rows = rows[:: -(-rows.shape[0] * len(calls) * probes // GRADIENT_ROWS) or 1]
                    if site.name not in sketches:
                        size = SKETCH_SIZE if site.out_features // site.groups > widest else None
                        sketches[site.name] = make_sketch(site.out_features, site.groups, size, program.device)
                    try:
                        sketches[site.name].update(rows)
                    except CalibrationError:  # not finite: a half-precision model's may overflow
                        broken.add(site.name)
            bar.advance()
    found = {
        name: sketch
        for name, sketch in sketches.items()
        if name not in broken and all(_has_energy(part) for part in sketch.parts)
    }
    refused = "no gradient that is finite and not zero reaches a layer" if calls else "calibration kept no inputs"
    return OutputGradients(found, "" if found or not table.sites else refused)


def _cause(error: RuntimeError) -> str:
    """Why a model cannot be differentiated: an operator without a derivative, or one that writes to what one needs.

    What an allocator says of its state is another in every run, and plans are the same.
    """
    said = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in said or "can't allocate" in said:
        return "memory ran out"
    return textwrap.shorten(said, MOST_SAID, placeholder=" ...") or type(error).__name__


def _has_energy(sketch: FrequentDirections) -> bool:
    """Whether what is kept of the rows is anything but zeros."""
    if not sketch.exact:
        return float(sketch.matrix(centered=False).square().sum()) > 0
    return sketch.squared_norm + sketch.rows * float(sketch.mean.square().sum()) > 0


def output_rows(site: Site, value: Tensor) -> Tensor:
    """A site's output, or its gradient, as rows ``[n, out_features]``."""
    if site.kind == "bmm" and site.groups > 1:
        value = value.movedim(-3, -2).flatten(-2)
    elif site.patch is not None:
        value = value.movedim(-len(site.patch.kernel) - 1, -1)
    return value.reshape(-1, site.out_features)


def random_projection(outputs: Outputs, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """<v, outputs> for standard normal v over all finite floating outputs that are not padding.

    Args:
        outputs: of a model.
        mask: bool ``[B, T]``, false at padding.
        generator: on the CPU; gives v.
    """
    total: Tensor | None = None
    for output in floating_outputs(outputs):
        real = without_padding(torch.view_as_real(output) if output.is_complex() else output, mask)
        direction = torch.randn(real.shape, generator=generator, dtype=torch.float64, device="cpu").to(real.device)
        share = (torch.where(real.isfinite(), real, 0).float() * direction).sum()
        total = share if total is None else total + share
    assert total is not None
    return total


def _gradients_of(
    program: Program,
    run: Callable[[Call], tuple[Outputs, dict[str, Tensor]]],
    call: Call,
    generator: torch.Generator,
    probes: int,
) -> list[dict[str, Tensor]]:
    """For each probe the gradient at each call of a site, by the call's node."""
    made: list[dict[str, Tensor]] = []
    with _differentiable(program.module), recording(), seeded(program.device):
        outputs, values = run(call)
        reached = {
            node: value
            for node, value in values.items()
            if value.requires_grad and value.is_floating_point() and value.layout is torch.strided
        }
        for probe in range(probes if reached else 0):
            scalar = random_projection(outputs, call.mask, generator)
            if not scalar.requires_grad:
                break
            more = probe + 1 < probes
            found = torch.autograd.grad(scalar, list(reached.values()), retain_graph=more, allow_unused=True)
            made.append({node: own.detach() for node, own in zip(reached, found, strict=True) if own is not None})
    return made


def _affordable(calibration: Calibration, effort: Effort) -> tuple[list[Call], int]:
    """The batches, spread over all, that fit the work allowed, and how many probes each gets.

    A backward pass to activations alone costs about as much as the forward pass.
    """
    calls = calibration.input_batches
    if not calls:
        return [], 0
    per_row = calibration.flops / max(calls[0].batch_size, 1)
    rows = min(int(GRADIENT_FLOPS / max(2 * per_row, 1.0)), effort.samples)
    sizes = [call.batch_size for call in calls]
    if rows >= sum(sizes):
        return calls, min(max(rows // max(sum(sizes), 1), 1), effort.probes)
    if rows < sizes[0]:
        return [calls[0].rows(0, max(1, rows))], 1
    count = max(1, rows * len(calls) // sum(sizes))
    return [calls[position * len(calls) // count] for position in range(count)], 1


@contextlib.contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Parameters that require gradients stand in for a program's own, whose flags are the user's.

    The stand-ins share memory with the parameters, and the tree of modules is the program's, not the user's.
    """
    stand_ins: dict[int, nn.Parameter] = {}
    kept: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and (parameter.is_floating_point() or parameter.is_complex()):
                kept.append((part._parameters, name, parameter))
    try:
        for owner, name, parameter in kept:
            if id(parameter) not in stand_ins:
                tensor = parameter.detach().clone() if parameter.is_inference() else parameter.detach()
                stand_ins[id(parameter)] = nn.Parameter(tensor, requires_grad=True)
            owner[name] = stand_ins[id(parameter)]
        yield
    finally:
        for owner, name, parameter in kept:
            owner[name] = parameter
