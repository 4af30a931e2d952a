"""What holds for every model of the zoo, as figures: the slow test asserts them, ``bench_zoo.py`` lists them.

The rewrite is compared with an independent reference: the original module in float64, each factored weight replaced by
the product of its factors, each bias that took up a shift by the new one, and a batch norm that was folded into a
factored convolution made to add nothing but that bias. How far the *same* module is from itself in float32 says what
rounding does to it; every error is judged by that.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import zoo
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lowrank_fx
from lowrank_fx import Keep, closed_loop, effects, gradients, session
from lowrank_fx.compare import relative_error
from lowrank_fx.errors import CallError, TargetError

TARGET = 0.8

# float32 rounds to 6e-8. A model's own rounding is measured (float32 against float64); the factored graph has other
# operators in another order, so its own may be a few times that. Below FLOOR nothing is asked.
MULTIPLE, FLOOR = 5.0, 2e-6

# Factoring has to move the output this many times as far as parity allows, or parity would say little.
FARTHER = 20

# A small model has few ranks on offer, so its budget cannot be used to the last FLOP; measured .022 at most.
SLACK = 0.03


@dataclass
class Findings:
    """What was found about one model; errors are relative L2 errors of all floating outputs.

    Attributes:
        way: how it was captured.
        dynamic: which other shapes the result takes: ``"batch"``, or why not.
        sites: how many weights can be factored.
        factored: how many are.
        left_alone: (name, reason) of the weights that cannot.
        unaccounted: weights of the original that the plan does not mention.
        target: the share of FLOPs that was asked for.
        kept: the share that is left.
        moved: factored model against original: far above rounding, or every check below is empty.
        rewrite: factored model against the independent reference.
        reference: what that reference is.
        rounding: the reference in float32 against itself in float64.
        folded: folded against factored model.
        loaded: saved and loaded against factored model; exactly 0.
        loaded_folded: saved and loaded against folded model; exactly 0.
        dense: the all-dense plan against the original.
        other_batch: the same at another batch size.
        own_rounding: the original in float32 against itself in float64.
        same_class: the output has the original's class.
        unchanged: the original's tensors are as they were.
        seconds: of ``optimize``, the plan for ``TARGET`` included.
        notes: what the plan tells its user.
    """

    way: str = ""
    dynamic: str = ""
    sites: int = 0
    factored: int = 0
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    unaccounted: list[str] = field(default_factory=list)
    target: float = TARGET
    kept: float = 1.0
    moved: float = 0.0
    rewrite: float = 0.0
    reference: str = ""
    rounding: float = 0.0
    folded: float = 0.0
    loaded: float = 0.0
    loaded_folded: float = 0.0
    dense: float = 0.0
    other_batch: float = 0.0
    own_rounding: float = 0.0
    same_class: bool = False
    unchanged: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def failures(self) -> list[str]:
        """What is not as it should be, a line each."""
        limit = max(FLOOR, MULTIPLE * max(self.rounding, self.own_rounding))
        said = [
            f"{name} is off by {value:.2g}, more than {limit:.2g}"
            for name, value in (
                ("the rewrite", self.rewrite),
                ("the fold", self.folded),
                ("the all-dense plan", self.dense),
                ("the all-dense plan at another batch size", self.other_batch),
            )
            if not value <= limit
        ]
        said += [
            f"the loaded {name} model is not bit-equal ({value:.2g})"
            for name, value in (("factored", self.loaded), ("folded", self.loaded_folded))
            if value != 0
        ]
        said += [f"nothing is said about {name}" for name in self.unaccounted]
        if not self.same_class:
            said.append("the output has another class")
        if not self.unchanged:
            said.append("the original was changed")
        if self.kept > self.target:
            said.append(f"{self.kept:.4f} of the FLOPs are left, {self.target:.4f} was asked")
        elif self.kept < self.target - SLACK:
            said.append(f"{self.kept:.4f} of the FLOPs are left, so the {self.target:.4f} that was asked is not used")
        if self.factored == 0:
            said.append("nothing was factored")
        elif self.moved <= FARTHER * limit:
            said.append(f"factoring moved the output by {self.moved:.2g} only, so parity says little")
        return said


@contextlib.contextmanager
def little_measured() -> Iterator[None]:
    """Effects, gradients and the closed loop on few rows: for tests that do not ask for the best plan."""
    with contextlib.ExitStack() as stack:
        for place, name in ((effects, "EFFECT_FLOPS"), (session, "MARGINAL_FLOPS"), (gradients, "GRADIENT_FLOPS")):
            stack.enter_context(patch.object(place, name, getattr(place, name) / 20))
        for place in (effects, session):
            stack.enter_context(patch.object(place, "MIN_EFFECT_ROWS", 2))
        stack.enter_context(patch.object(closed_loop, "ROWS", 1))
        stack.enter_context(patch.object(closed_loop, "MAX_WIDTH", 600))
        yield


def check(model: nn.Module, batches: list[Any], folder: Path) -> Findings:
    """Optimize one model of the zoo, and measure everything that has to hold.

    Args:
        model: in eval mode.
        batches: as :func:`zoo.make` gives them.
        folder: for what is saved.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = time.perf_counter()
    with little_measured():
        dense = lowrank_fx.optimize(model, batches, target=Keep(flops=1.0), compile=False, progress=False)
        found = Findings()
        try:
            fast = dense.replan(Keep(flops=TARGET))
        except TargetError as error:
            match = re.search(r"reachable is flops=([\d.]+)", str(error))
            if match is None:
                raise
            found.target = float(match[1])
            fast = dense.replan(Keep(flops=found.target))
    found.seconds = time.perf_counter() - start

    plan = fast.plan
    found.way = fast.artifact.program.way
    found.sites, found.factored = len(plan.sites), len(plan.factored)
    found.left_alone = [(entry.name, entry.reason) for entry in plan.left_alone]
    found.unaccounted = unaccounted(model, fast)
    found.notes = list(plan.notes)
    found.kept = plan.totals.kept("flops", "model")

    batch = batches[0]
    original, expected = zoo.call(model, batch), zoo.call(fast, batch)
    found.same_class = type(expected) is type(original)
    found.moved = relative_error(expected, original)
    found.own_rounding = rounding(model, batch)
    found.dense = relative_error(zoo.call(dense, batch), original)
    found.dynamic, found.other_batch = other_batch(model, dense, batch)

    folded = fast.fold()
    found.folded = relative_error(zoo.call(folded, batch), expected)
    reference, found.reference = dense_reference(model, fast)
    if reference is None:
        found.rewrite, found.rounding = found.folded, found.own_rounding
    else:
        found.rewrite = relative_error(expected, zoo.call(reference, _wide(batch)))
        found.rounding = relative_error(zoo.call(reference.float(), batch), zoo.call(reference.double(), _wide(batch)))

    for name, made in (("factored", fast), ("folded", folded)):
        made.save(folder / name)
        loaded = lowrank_fx.load(model, folder / name, compile=False)
        apart = relative_error(zoo.call(loaded, batch), zoo.call(made, batch))
        setattr(found, "loaded" if name == "factored" else "loaded_folded", apart)
    after = model.state_dict()
    found.unchanged = after.keys() == before.keys() and all(before[name].equal(after[name]) for name in before)
    return found


def unaccounted(model: nn.Module, fast: Any) -> list[str]:
    """The weights of the original (any name of each) that neither a site, nor a refusal, nor clean-up names."""
    plan = fast.plan
    known = {site.name for site in plan.sites} | {site.weight for site in plan.sites}
    known |= {entry.name for entry in plan.left_alone}
    for line in plan.cleanup:
        known |= set(re.findall(r"[\w.]+", line))
    return [
        names[0]
        for names, _ in zoo.weights(model)
        if not any(name in known or name.removesuffix(".weight") in known for name in names)
    ]


def rounding(model: nn.Module, batch: Any) -> float:
    """A model in float32 against itself in float64."""
    return relative_error(zoo.call(model, batch), zoo.call(_double(model), _wide(batch)))


def other_batch(model: nn.Module, dense: nn.Module, batch: Any) -> tuple[str, float]:
    """Whether the result takes one row and three rows, and the worst error of the all-dense plan on them."""
    worst = 0.0
    for rows in (1, 3):
        few = zoo.mapped(batch, operator.itemgetter(slice(rows)))
        try:
            worst = max(worst, relative_error(zoo.call(dense, few), zoo.call(model, few)))
        except CallError as error:
            return f"{rows} rows are refused: {error}", worst
    return "batch", worst


def _double(model: nn.Module) -> nn.Module:
    """A copy in float64; ``train`` makes it forget what earlier calls have cached."""
    return copy.deepcopy(model).double().train().eval()


def _wide(batch: Any) -> Any:
    return zoo.mapped(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


# ---- the independent reference ---------------------------------------------------------------------------------------


class _NoPlaceError(Exception):
    """A factored weight has no place of its own in the original."""


def dense_reference(model: nn.Module, fast: Any) -> tuple[nn.Module | None, str]:
    """The original in float64 with dense products of the factors for weights; None where a weight has no place in it.

    Returns:
        The reference and what it is.
    """
    reference = _double(model)
    sites = fast.artifact.sites
    norms = _folded_norms(fast.plan.cleanup)
    try:
        for site in sites.values():
            if site.pair is not None:
                raise _NoPlaceError(f"{site.name} came as a pair")
            weight = _product(site, _factors(fast, site))
            if site.tied:  # an embedding keeps the weight that the reference had in both places
                _untie(reference, site.weight)
            _put(reference, fast, site.weight, weight)
            owner = site.weight.rpartition(".")[0]
            shift = norms.pop(owner, None)
            for name in site.biases:
                bias = _tensor(fast, name)
                if shift is None:
                    _put(reference, fast, name, bias)
                else:
                    _neutralise(reference.get_submodule(shift), bias)
                    if name in dict(reference.named_parameters()):
                        _put(reference, fast, name, torch.zeros_like(bias))
    except _NoPlaceError as reason:
        return None, f"the folded model ({reason})"
    return reference, "float64"


def _factors(fast: Any, site: Any) -> list[Tensor]:
    """The two or three factors of a site, the one that meets the input first."""
    held, sites = dict(fast.named_parameters()), fast.artifact.sites
    owner = next(entry.shares for entry in fast.plan.sites if entry.name == site.name) or site.name
    names = [sites[owner].attribute("factor_in"), site.attribute("factor_mid"), site.attribute("factor_out")]
    return [_tensor(fast, name) for name in names if name in held]


def _product(site: Any, factors: list[Tensor]) -> Tensor:
    """The weight that factors stand for, in its own shape."""
    first, *others = factors
    if site.kind == "bmm":
        return first @ others[0]
    if site.transposed:
        return (others[0] @ first).t()
    for second in others:
        # Of two layers in a row, each position of the kernel belongs to one position of each; a group has its own pair.
        groups = first.shape[0] // second.shape[1]
        inner, outer = (each.reshape(groups, -1, *each.shape[1:]) for each in (first, second))
        first = torch.einsum("gor...,grc...->goc...", outer, inner).flatten(0, 1)
    return first.reshape(site.shape)


def _tensor(fast: nn.Module, name: str) -> Tensor:
    return fast.get_parameter(name).detach().double()


def _folded_norms(cleanup: tuple[str, ...]) -> dict[str, str]:
    """The batch norm that was folded into each convolution."""
    norms: dict[str, str] = {}
    for line in cleanup:
        match = re.fullmatch(r"(\S+) folded into (\S+)", line)
        if match:
            norms[match[2]] = match[1]
    return norms


def _neutralise(norm: nn.Module, bias: Tensor) -> None:
    """Make a batch norm add ``bias`` and do nothing else."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(-bias)
    norm.running_var.fill_(1 - norm.eps)
    if norm.affine:
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)


def _untie(reference: nn.Module, name: str) -> None:
    """Give a module a weight of its own."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = reference.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(getattr(module, leaf).detach().clone()))
    except AttributeError as error:
        raise _NoPlaceError(name) from error


@torch.no_grad()
def _put(reference: nn.Module, fast: Any, name: str, value: Tensor) -> None:
    """Give a parameter of the reference a value, by the name it has in the captured graph."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = reference.get_submodule(owner)
    except AttributeError as error:
        raise _NoPlaceError(name) from error
    if parametrize.is_parametrized(module, leaf):
        setattr(module, leaf, value)  # sets what the weight is computed from
        return
    parameter = getattr(module, leaf, None)
    if isinstance(parameter, nn.Parameter):
        if parameter.shape != value.shape:
            raise _NoPlaceError(f"{name} has another shape")
        parameter.copy_(value)
        return
    # A part of a packed projection: in_proj_weight_1 are the rows of in_proj_weight behind those of in_proj_weight_0.
    packed, _, part = leaf.rpartition("_")
    parameter = getattr(module, packed, None) if part.isdigit() else None
    if not isinstance(parameter, nn.Parameter):
        raise _NoPlaceError(name)
    clean = fast.session.program.module
    prefix = f"{owner}." if owner else ""
    start = sum(clean.get_parameter(f"{prefix}{packed}_{index}").shape[0] for index in range(int(part)))
    parameter[start : start + value.shape[0]] = value
