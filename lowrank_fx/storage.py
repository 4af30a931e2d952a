"""A directory that holds an optimized model: ``plan.json`` and its weights in safetensors files. Never pickle.

The weights are written first, under names that contain their hash, and reach the disk; ``plan.json`` is replaced last,
atomically. A save that is killed leaves the old or the new model readable, never a mixture.

What is read is distrusted: ``manifest.py`` checks ``plan.json``, ``weight_files.py`` the files it names, both before
the model is captured or anything of a stored size is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lowrank_fx._files import write_atomic
from lowrank_fx._sizes import parse_size
from lowrank_fx.batches import Call
from lowrank_fx.capture import capture, device_of
from lowrank_fx.errors import StorageError
from lowrank_fx.example_calls import decode_call, encode_call
from lowrank_fx.fingerprint import BaseWeight, base_weights
from lowrank_fx.forms import FORMS, SHARED, Factors
from lowrank_fx.gauge import Gauge
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.latency import PairedTiming
from lowrank_fx.manifest import PLAN_FILE, Captured, Manifest, read_manifest
from lowrank_fx.passes.factorize_regauged import ORDER
from lowrank_fx.plan import Plan, SitePlan
from lowrank_fx.program import Program
from lowrank_fx.sites import Site
from lowrank_fx.timings import SiteSpeed
from lowrank_fx.transfer import Before, factors_of, move, transferred
from lowrank_fx.tree_program import TreeProgram
from lowrank_fx.weight_files import (
    MAX_SHARD_SIZE,
    TEMPORARY_PATTERNS,
    WEIGHTS_PATTERNS,
    Stored,
    check_weight_files,
    load_weight_files,
    write_weight_files,
)

CAPTURED = "captured:"
"""In front of the name of a tensor, in the file: the value that the captured model has."""


@dataclass
class Artifact:
    """An optimized model, plainly: what is kept, saved and loaded.

    Attributes:
        program: the factored (or folded) model.
        plan: the plan it was rewritten by.
        sites: the sites that are factored, by name.
        base: the tensors of the user's model when the plan was made, by name.
        timing: measured against the original, or None.
        folded: names of the sites whose pairs have been multiplied back into dense operators.
        before: what the captured model held where this one differs; None where that is not known.
        speeds: measured of the factored sites against their dense originals, by name.
    """

    program: Program
    plan: Plan
    sites: Mapping[str, Site]
    base: Mapping[str, BaseWeight]
    timing: PairedTiming | None = None
    folded: tuple[str, ...] = ()
    before: Before | None = None
    speeds: Mapping[str, SiteSpeed] = field(default_factory=dict)


def save(artifact: Artifact, folder: str | os.PathLike[str], max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Write ``artifact`` into ``folder``, which is made if it does not exist.

    Args:
        artifact: the model.
        folder: the directory.
        max_shard_size: how large a file of weights may be, such as ``"5GB"`` or a number of bytes.

    Raises:
        OptionError: ``max_shard_size`` is no size.
        StorageError: the folder cannot be written.
    """
    root, limit = Path(folder), parse_size("max_shard_size", max_shard_size, MAX_SHARD_SIZE, whole=True)
    program, before = artifact.program, artifact.before
    tensors = {name: tensor.detach() for name, tensor in _distinct(program.module).items()}
    moved = () if before is None else tuple(name for name in before.values if name in tensors)
    if before is not None:
        tensors |= {CAPTURED + name: before.values[name] for name in moved}
    calls = program.calls if isinstance(program, GraphProgram) else None
    try:
        root.mkdir(parents=True, exist_ok=True)
        for path in _own(root, TEMPORARY_PATTERNS):  # of saves that were killed
            path.unlink(missing_ok=True)
        old = _own(root, WEIGHTS_PATTERNS)
        manifest = Manifest(
            plan=artifact.plan,
            capture=program.way,
            call=None if calls is None else encode_call(calls.example),
            ignored=() if calls is None else tuple(sorted(calls.ignored)),
            files=write_weight_files(root, tensors, limit),
            base=artifact.base,
            captured=None if before is None else Captured(before.gaps, moved),
            timing=artifact.timing,
            folded=artifact.folded,
            speeds=artifact.speeds,
        )
        write_atomic(root / PLAN_FILE, manifest.to_json())
        for path in old - {root / entry.file for entry in manifest.files}:
            path.unlink(missing_ok=True)
    except (OSError, SafetensorError, ValueError) as error:
        raise StorageError(f"{root}: the model could not be saved: {error}") from error


def load(
    model: nn.Module, folder: str | os.PathLike[str], example: Call | None = None, *, strict: bool = True
) -> Artifact:
    """Read an artifact back; ``model`` gives the code, and must hold the weights the plan was made for.

    Args:
        model: the original model.
        folder: what :func:`save` wrote.
        example: an example call, needed only if the saved one could not be stored as JSON.
        strict: False takes a model with other weights of the same shapes: the stored factors follow its weights, see
            ``transfer.py``, and what is not factored is its own.

    Raises:
        StorageError: the folder is missing or damaged, or does not fit the model; the message names the layer.
    """
    root = Path(folder)
    saved = read_manifest(root)
    actual = base_weights(model)
    changed = _changed(root, saved, actual, strict)
    stored = check_weight_files(root, saved.files, _most_bytes(model))
    program = _captured(root, model, saved, example)
    sites = _match_sites(root, program, saved.plan)
    own = {entry.name: site for entry, site in sites}
    empty = {entry.name: (site, _empty_factors(root, program, entry, own, stored)) for entry, site in sites}
    made = program.factorize(empty, clone=True)
    if saved.folded:
        made = made.fold({name: own[name] for name in saved.folded})
    tensors = load_weight_files(root, saved.files)
    before = None
    if saved.captured is not None:
        for name in saved.captured.moved:
            if CAPTURED + name not in tensors:
                raise StorageError(f"{root}: tensor {CAPTURED + name[:200]!r} is missing in the files")
        before = Before(saved.captured.gaps, {name: tensors.pop(CAPTURED + name) for name in saved.captured.moved})
    _fill(root, made.module, tensors)
    for entry, site in sites:
        _check_order(root, made.module, entry, site)
    artifact = Artifact(made, saved.plan, own, saved.base, saved.timing, saved.folded, before, saved.speeds)
    if changed:
        return _refactored(program, artifact, actual)
    if before is None and not saved.folded:
        artifact.before = Before.of(program, own, saved.plan.factored, made.module)
    return artifact


def read_plan(folder: str | os.PathLike[str]) -> tuple[Plan, PairedTiming | None]:
    """The plan and the timing of a saved model; no weight is read.

    Raises:
        StorageError: the folder holds no plan of a format that is known.
    """
    saved = read_manifest(Path(folder))
    return saved.plan, saved.timing


def read_speeds(folder: str | os.PathLike[str]) -> Mapping[str, SiteSpeed]:
    """The measured speeds of a saved model's layers, by name; no weight is read.

    Raises:
        StorageError: the folder holds no plan of a format that is known.
    """
    return read_manifest(Path(folder)).speeds


def _refactored(program: Program, stored: Artifact, actual: Mapping[str, BaseWeight]) -> Artifact:
    """A captured model with its own weights in the forms and ranks of a stored one.

    Args:
        program: the captured model.
        stored: the stored model, with this model's code.
        actual: the tensors of the user's model.
    """
    assert stored.before is not None
    factored: dict[str, tuple[Site, Factors]] = {}
    again: dict[str, SitePlan] = {}
    for entry in stored.plan.factored:
        site = stored.sites[entry.name]
        kept = factors_of(stored.program.module, entry, stored.sites)
        factors = transferred(site, entry, program.weight(site), kept, stored.before.gaps[site.name])
        if factors is not kept:
            gauge = factors.gauge
            pivots, gathered = (None, False) if gauge is None else (gauge.start, gauge.order is not None)
            again[site.name] = replace(entry, pivots=pivots, gathered=gathered)
        factored[site.name] = (site, factors)
    made = program.factorize(factored, clone=True)
    move(made.module, stored.before.values, stored.program.module.state_dict())
    note = (
        f"loaded with strict=False on other weights than the plan was made for: {len(again)} of {len(factored)} "
        "factored layers followed them, without data; errors and timing are those of the first weights"
    )
    entries = tuple(again.get(entry.name, entry) for entry in stored.plan.sites)
    plan = replace(stored.plan, sites=entries, notes=(*stored.plan.notes, note))
    before = Before.of(program, stored.sites, plan.factored, made.module)
    return Artifact(made, plan, stored.sites, actual, stored.timing, (), before, stored.speeds)


def _captured(root: Path, model: nn.Module, saved: Manifest, example: Call | None) -> Program:
    """The user's model, captured as it was when it was saved."""
    if saved.capture == "modules":
        return TreeProgram.from_model(model, known={entry.weight for entry in saved.plan.sites})
    if example is None:
        if saved.call is None:
            raise StorageError(
                f"{root}: the example inputs could not be stored; pass load(model, folder, example=batch)"
            )
        example = decode_call(saved.call).to(device_of(model))
    program = GraphProgram.from_capture(capture(model, example))
    program.calls = replace(program.calls, ignored=frozenset(saved.ignored) | program.calls.ignored)
    return program


def _distinct(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's state, each under the first of its names."""
    seen: dict[int, str] = {}
    state = module.state_dict(keep_vars=True).items()
    return {
        name: tensor
        for name, tensor in state
        if isinstance(tensor, Tensor) and seen.setdefault(id(tensor), name) == name
    }


def _own(root: Path, patterns: Sequence[str]) -> set[Path]:
    """The files in a folder that only a save can have made."""
    return {path for pattern in patterns for path in root.glob(pattern)}


def _most_bytes(model: nn.Module) -> int:
    """More bytes than a saved model of this one can have: every layer a pair at full rank, all of it in float64."""
    return 8 * (4 * sum(tensor.numel() for tensor in _distinct(model).values()) + 2**26)


def _fill(root: Path, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy stored values into a module's tensors, each one exactly once."""
    own = _distinct(module)
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors or name not in own:
            where = "missing in the file" if name in own else "not in the model"
            raise StorageError(f"{root}: tensor {name[:200]!r} is {where}")
        expected, stored = own[name], tensors[name]
        cast = stored.is_floating_point() and expected.is_floating_point()  # the module was cast after it was made
        if stored.shape != expected.shape or (stored.dtype != expected.dtype and not cast):
            raise StorageError(_differs(root, name, stored.shape, stored.dtype, expected.shape, expected.dtype))
        with torch.no_grad():
            expected.data = stored.to(expected.device)


def _differs(
    root: Path, name: str, shape: Sequence[int], dtype: torch.dtype, needed: Sequence[int], of: torch.dtype
) -> str:
    return f"{root}: tensor {name!r} is {tuple(shape)} {dtype}, the model needs {tuple(needed)} {of}"


def _changed(root: Path, saved: Manifest, actual: Mapping[str, BaseWeight], strict: bool) -> bool:
    """Whether the model's weights have other values than those the plan was made for; all else must be the same."""
    stored, changed = saved.base, []
    for name in [*stored, *(name for name in actual if name not in stored)]:
        if name not in actual or name not in stored:
            side = "this model has no such tensor" if name in stored else "the plan was made without it"
            raise StorageError(f"{root}: the plan does not fit this model: {name[:200]!r}: {side}")
        want, have = stored[name], actual[name]
        if (want.shape, want.dtype) != (have.shape, have.dtype):
            raise StorageError(
                f"{root}: the plan does not fit this model: {name!r} is {have.shape} {have.dtype}, "
                f"the plan was made for {want.shape} {want.dtype[:60]}"
            )
        if want.sha256 != have.sha256:
            changed.append(name)
    if not changed:
        return False
    other = f"{root}: {changed[0]!r} has other values than the weights the plan was made for"
    if strict:
        raise StorageError(
            f"{other}; load the original weights into the model first, optimize it again, or pass strict=False to "
            "factor these weights by the stored plan"
        )
    if saved.folded:
        raise StorageError(f"{other}, and layers of the saved model are folded; strict=False needs it unfolded")
    if saved.captured is None:
        raise StorageError(
            f"{other}, and the folder is of format 1, which does not know how biases were moved; load it with those "
            "weights and save it again before strict=False"
        )
    return True


def _match_sites(root: Path, program: Program, plan: Plan) -> list[tuple[SitePlan, Site]]:
    """The factored sites, each checked against its entry of the plan."""
    table = {site.name: site for site in program.find_sites().sites}
    matched = []
    for entry in plan.factored:
        site = table.get(entry.name)
        if site is None:
            raise StorageError(f"{root}: the plan factors {entry.name!r}, which is no layer of this model")
        if (site.out_features, site.in_features) != (entry.out_features, entry.in_features):
            raise StorageError(
                f"{root}: {entry.name!r} is {site.out_features} x {site.in_features}, "
                f"the plan says {entry.out_features} x {entry.in_features}"
            )
        form, rank = FORMS[entry.form], entry.rank
        assert rank is not None
        # No form needs more than a pair of full rank, whatever stands in the file; a first factor that several layers
        # share may have a row for each input.
        full = site.in_features if entry.basis == SHARED else min(site.out_features, site.in_features)
        most = (site.out_features + site.in_features) * full
        if not form.applies(site) or form.params(site, rank) > most:
            raise StorageError(f"{root}: {entry.name!r} cannot have the form {entry.form!r} at rank {rank}")
        if entry.pivots is not None and not form.regauges(site):
            raise StorageError(f"{root}: {entry.name!r} cannot be re-gauged, the plan says that it is")
        matched.append((entry, site))
    return matched


def _empty_factors(
    root: Path, program: Program, entry: SitePlan, sites: Mapping[str, Site], stored: Mapping[str, Stored]
) -> Factors:
    """Factors of the planned shape, which is that in the file; their values come from there."""
    site = sites[entry.name]
    weight = program.weight(site)
    blank = _blank(entry, sites, weight.to("meta"))
    for leaf, name in blank.names(site).items():
        found, tensor = stored.get(name), blank.tensors[leaf]
        if found is not None and found.shape != tensor.shape:
            raise StorageError(_differs(root, name, found.shape, found.dtype, tensor.shape, tensor.dtype))
    return _blank(entry, sites, weight)


def _blank(entry: SitePlan, sites: Mapping[str, Site], weight: Tensor) -> Factors:
    assert entry.rank is not None
    site = sites[entry.name]
    factors = FORMS[entry.form].blank(site, weight, entry.rank)
    if entry.shares is not None:
        return replace(factors, first=sites[entry.shares].attribute("factor_in"))
    if entry.pivots is None:
        return factors
    order = torch.arange(site.in_features, device=weight.device) if entry.gathered else None
    columns = factors.factor_in[:, entry.rank :].contiguous()
    return replace(factors, factor_in=columns, gauge=Gauge(entry.pivots, order))


def _check_order(root: Path, module: nn.Module, entry: SitePlan, site: Site) -> None:
    """Each input must stand once in the order in which inputs are gathered."""
    if not entry.gathered:
        return
    state = module.state_dict()
    for name in (site.attribute(ORDER), *(f"{call.node}.{ORDER}" for call in site.calls)):
        if name in state and not torch.equal(state[name].sort().values.cpu(), torch.arange(site.in_features)):
            raise StorageError(f"{root}: tensor {name!r} is not an order of {site.in_features} inputs")
