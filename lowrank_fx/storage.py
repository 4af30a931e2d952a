"""A directory that holds an optimized model: ``plan.json`` and one safetensors file. Never pickle.

The weights are written first, under a name that contains their hash; ``plan.json`` is replaced last, atomically. A save
that is killed leaves the old or the new model readable, never a mixture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_fx._files import read_json, sha256_file, write_atomic
from lowrank_fx.batches import Call
from lowrank_fx.capture import capture, device_of
from lowrank_fx.errors import LowRankError, PlanError, StorageError
from lowrank_fx.fingerprint import BaseWeight, base_weights
from lowrank_fx.forms import FORMS, Factors
from lowrank_fx.gauge import Gauge
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.latency import PairedTiming
from lowrank_fx.plan import Plan
from lowrank_fx.program import Program
from lowrank_fx.sites import Site
from lowrank_fx.tree_program import TreeProgram

FORMAT = 1
PLAN_FILE = "plan.json"

WEIGHTS_PATTERN = f"model-{'[0-9a-f]' * 16}.safetensors"
"""Names of our own weight files; a sharded checkpoint's ``model-00001-of-00002.safetensors`` is the user's."""


@dataclass
class Artifact:
    """An optimized model, plainly: what is kept, saved and loaded.

    Attributes:
        program: the factored (or folded) model.
        plan: the plan it was rewritten by.
        sites: the sites that are factored, by name.
        base: the tensors of the user's model when the plan was made, by name.
        timing: measured against the original, or None.
        folded: the pairs have been multiplied back into dense operators.
    """

    program: Program
    plan: Plan
    sites: Mapping[str, Site]
    base: Mapping[str, BaseWeight]
    timing: PairedTiming | None = None
    folded: bool = False


def save(artifact: Artifact, folder: str | os.PathLike[str]) -> None:
    """Write ``artifact`` into ``folder``, which is made if it does not exist.

    Raises:
        StorageError: the folder cannot be written.
    """
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        old = set(root.glob(WEIGHTS_PATTERN))
        program = artifact.program
        calls = program.calls if isinstance(program, GraphProgram) else None
        weights = _write_weights(program.module, root)
        data = {
            "format": FORMAT,
            "plan": json.loads(artifact.plan.to_json()),
            "capture": program.way,
            "call": None if calls is None else _encode((list(calls.example.args), calls.example.kwargs)),
            "ignored": [] if calls is None else sorted(calls.ignored),
            "weights": {"file": weights.name, "sha256": sha256_file(weights)},
            "base": {name: asdict(entry) for name, entry in artifact.base.items()},
            "timing": None if artifact.timing is None else asdict(artifact.timing),
            "folded": artifact.folded,
        }
        # Keys stay in their order: that of a dictionary among the inputs is part of how the graph is called.
        write_atomic(root / PLAN_FILE, (json.dumps(data, indent=1) + "\n").encode())
        for path in old - {weights}:
            path.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{root}: the model could not be saved: {error}") from error


def load(model: nn.Module, folder: str | os.PathLike[str], example: Call | None = None) -> Artifact:
    """Read an artifact back; ``model`` gives the code, and must hold the weights the plan was made for.

    Args:
        model: the original model.
        folder: what :func:`save` wrote.
        example: an example call, needed only if the saved one could not be stored as JSON.

    Raises:
        StorageError: the folder is missing or damaged, or does not fit the model; the message names the layer.
    """
    root = Path(folder)
    data = read_json(root / PLAN_FILE)
    plan, timing = read_plan(root, data)
    try:
        base = {
            name: BaseWeight(tuple(entry["shape"]), entry["dtype"], entry["sha256"])
            for name, entry in data["base"].items()
        }
        weights, folded = data["weights"], bool(data["folded"])
        ignored = frozenset(str(name) for name in data["ignored"])
        way = data["capture"]
        if way not in ("export", "modules"):
            raise ValueError(f"capture is {way!r}")
        stored_call = _decode(data["call"]) if example is None else None
        path = root / _plain_name(weights["file"])
        checksum = weights["sha256"]
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise StorageError(f"{root / PLAN_FILE}: damaged: {error!r}") from error
    _check_base(root, base, base_weights(model))
    if not path.is_file():
        raise StorageError(f"{path}: the file that {PLAN_FILE} names is missing")
    if sha256_file(path) != checksum:
        raise StorageError(f"{path}: the file is damaged: its checksum is not the one in {PLAN_FILE}")
    program: Program
    if way == "modules":
        program = TreeProgram.from_model(model, known={entry.weight for entry in plan.sites})
    else:
        if example is None:
            if stored_call is None:
                raise StorageError(
                    f"{root}: the example inputs could not be stored; pass load(model, folder, example=batch)"
                )
            example = Call(tuple(stored_call[0]), stored_call[1]).to(device_of(model))
        program = GraphProgram.from_capture(capture(model, example))
        program.calls = replace(program.calls, ignored=ignored | program.calls.ignored)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path}: not a safetensors file: {error}") from error
    sites = _match_sites(root, program, plan)
    empty = {name: (site, _empty_factors(program, plan, site)) for name, site in sites.items()}
    program = program.factorize(empty, clone=True)
    if folded:
        program = program.fold(sites)
    _fill(path, program.module, tensors)
    return Artifact(program, plan, sites, base, timing, folded)


def read_plan(folder: str | os.PathLike[str], data: Any = None) -> tuple[Plan, PairedTiming | None]:
    """The plan and the timing of a saved model; no weight is read.

    Raises:
        StorageError: the folder holds no plan of this format.
    """
    path = Path(folder) / PLAN_FILE
    data = read_json(path) if data is None else data
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise StorageError(f"{path}: format {FORMAT} is expected, the file says {found!r}")
    try:
        plan = Plan.from_json(json.dumps(data["plan"]))
        timing = None if data["timing"] is None else PairedTiming(**data["timing"])
    except (PlanError, KeyError, TypeError) as error:
        raise StorageError(f"{path}: {error}") from error
    except LowRankError as error:
        raise StorageError(f"{path}: {error}") from error
    return plan, timing


def _write_weights(module: nn.Module, root: Path) -> Path:
    """Write the state dict, each tensor once, and name the file by its content."""
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen[id(tensor)] = name
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    temporary = root / f".model-{os.getpid()}.tmp"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        final = root / f"model-{sha256_file(temporary)[:16]}.safetensors"
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    return final


def _fill(path: Path, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy stored values into a module's tensors, each one exactly once."""
    own = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    distinct: dict[int, str] = {}
    for name, tensor in own.items():
        distinct.setdefault(id(tensor), name)
    wanted = set(distinct.values())
    for name in sorted(wanted | set(tensors)):
        if name not in tensors or name not in wanted:
            where = "missing in the file" if name in wanted else "not in the model"
            raise StorageError(f"{path}: tensor {name!r} is {where}")
        expected = own[name]
        stored = tensors[name]
        cast = stored.is_floating_point() and expected.is_floating_point()  # the module was cast after it was made
        if stored.shape != expected.shape or (stored.dtype != expected.dtype and not cast):
            raise StorageError(
                f"{path}: tensor {name!r} is {tuple(stored.shape)} {stored.dtype}, "
                f"the model needs {tuple(expected.shape)} {expected.dtype}"
            )
        with torch.no_grad():
            expected.data = stored.to(expected.device)


def _check_base(root: Path, stored: Mapping[str, BaseWeight], actual: Mapping[str, BaseWeight]) -> None:
    for name in [*stored, *(name for name in actual if name not in stored)]:
        if name not in actual or name not in stored:
            side = "this model has no such tensor" if name in stored else "the plan was made without it"
            raise StorageError(f"{root}: the plan does not fit this model: {name!r}: {side}")
        want, have = stored[name], actual[name]
        if (want.shape, want.dtype) != (have.shape, have.dtype):
            raise StorageError(
                f"{root}: the plan does not fit this model: {name!r} is {have.shape} {have.dtype}, "
                f"the plan was made for {want.shape} {want.dtype}"
            )
        if want.sha256 != have.sha256:
            raise StorageError(
                f"{root}: {name!r} has other values than the weights the plan was made for; "
                "load the original weights into the model first, or optimize it again"
            )


def _match_sites(root: Path, program: Program, plan: Plan) -> dict[str, Site]:
    table = {site.name: site for site in program.find_sites().sites}
    matched = {}
    for entry in plan.factored:
        site = table.get(entry.name)
        if site is None:
            raise StorageError(f"{root}: the plan factors {entry.name!r}, which is no layer of this model")
        if (site.out_features, site.in_features) != (entry.out_features, entry.in_features):
            raise StorageError(
                f"{root}: {entry.name!r} is {site.out_features} x {site.in_features}, "
                f"the plan says {entry.out_features} x {entry.in_features}"
            )
        matched[entry.name] = site
    return matched


def _empty_factors(program: Program, plan: Plan, site: Site) -> Factors:
    """Factors of the planned shape; their values come from the file."""
    entry = next(entry for entry in plan.factored if entry.name == site.name)
    assert entry.rank is not None
    weight = program.weight(site)
    factors = FORMS[entry.form].blank(site, weight, entry.rank)
    if entry.pivots is None:
        return factors
    order = torch.arange(site.in_features, device=weight.device) if entry.gathered else None
    columns = factors.factor_in[:, entry.rank :].contiguous()
    return replace(factors, factor_in=columns, gauge=Gauge(entry.pivots, order))


def _plain_name(name: str) -> str:
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


# ---- example calls as JSON -------------------------------------------------------------------------------------------


def _encode(value: Any) -> Any:
    """Nested containers, scalars and tensors (as dtype and shape) as JSON data; None where something else occurs."""
    try:
        return _encode_strict(value)
    except TypeError:
        return None


def _encode_strict(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode_strict(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode_strict(item) for key, item in value.items()}}
    raise TypeError(type(value).__name__)


def _decode(data: Any) -> Any:
    if data is None:
        return None
    ((kind, value),) = data.items()
    if kind == "tensor":
        dtype = getattr(torch, value[0])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value[0]!r} is not a dtype")
        return torch.zeros([int(size) for size in value[1]], dtype=dtype)
    if kind == "value":
        return value
    if kind == "dict":
        return {key: _decode(item) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [_decode(item) for item in value]
        return items if kind == "list" else tuple(items)
    raise ValueError(f"unknown kind {kind!r}")
