"""Folders that earlier versions saved are read, and give what they gave; the schema describes those of this version."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from golden_folders import given
from jsonschema import Draft202012Validator
from safetensors.torch import load_file

import lowrank_fx
from lowrank_fx import plan as plan_module
from lowrank_fx.errors import LowRankError
from lowrank_fx.example_calls import _DTYPES
from lowrank_fx.fingerprint import BaseWeight
from lowrank_fx.forms import DENSE, FORMS
from lowrank_fx.latency import PairedTiming
from lowrank_fx.manifest import FORMAT, PLAN_FILE, READERS, Captured, Manifest, read_manifest
from lowrank_fx.plan import PLAN_VERSION, MetricPoint, MetricSearch, Plan, Refinement, SitePlan, Totals, TradeOff
from lowrank_fx.storage import CAPTURED
from lowrank_fx.targets import CostKind, Keep, Metric, Target, Tolerance
from lowrank_fx.timings import SiteSpeed
from lowrank_fx.weight_files import WeightFile

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob(f"v*/*/saved/{PLAN_FILE}"))
SCHEMA = json.loads((files(lowrank_fx) / "schemas" / "plan.schema.json").read_text("utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)


def name_of(folder: Path) -> str:
    return f"{folder.parent.parent.name}-{folder.parent.name}"


# ---- golden folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_a_folder_of_any_version_gives_what_it_gave(folder: Path, tmp_path: Path) -> None:
    model, inputs, outputs = given(folder.parent)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded = lowrank_fx.load(model, folder, compile=False)
    with torch.no_grad():
        # Kernels of another machine or version of torch sum in another order: some roundings of float32.
        torch.testing.assert_close(loaded(inputs), outputs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loaded(inputs[:1]), outputs[:1], rtol=1e-5, atol=1e-6)
    assert loaded.plan.factored
    assert (folder.parent.name == "folded") == bool(loaded.artifact.folded)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # Saved again, it is a folder of this version.
    loaded.save(tmp_path)
    data = json.loads((tmp_path / PLAN_FILE).read_text())
    assert data["format"] == FORMAT
    VALIDATOR.validate(data)
    state = loaded.artifact.program.module.state_dict()
    for path in tmp_path.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert name.startswith(CAPTURED) or torch.equal(state[name], tensor)


def test_every_format_that_can_be_read_has_golden_folders() -> None:
    """Each with every kind of model there was, and small."""
    kinds = {f"v{number}": set[str]() for number in READERS}
    for folder in FOLDERS:
        kinds[folder.parent.parent.name].add(folder.parent.name)
    common = {"linear", "conv", "split", "tucker", "tree", "folded", "regauged"}
    assert {version: common - found for version, found in kinds.items()} == {version: set() for version in kinds}
    assert max(READERS) == FORMAT
    assert len(list((GOLDEN / f"v{FORMAT}" / "sharded" / "saved").glob("*.safetensors"))) > 2
    assert max(path.stat().st_size for path in GOLDEN.rglob("*.*")) < 40_000
    forms = {entry.form for folder in FOLDERS for entry in read_manifest(folder).plan.factored}
    assert {"lowrank", "channel", "channel_in", "tucker2"} <= forms
    assert any(site.shares for site in read_manifest(GOLDEN / f"v{FORMAT}" / "shared" / "saved").plan.sites)


def test_a_plan_of_an_older_version_may_lack_new_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = json.loads((GOLDEN / f"v{FORMAT}" / "linear" / "saved" / PLAN_FILE).read_text())["plan"]
    del plan["refinement"]
    for site in plan["sites"]:
        del site["gathered"]
    with pytest.raises(LowRankError, match="plan lacks 'refinement'"):
        Plan.from_data({**plan, "version": PLAN_VERSION})
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "PLAN_VERSION", PLAN_VERSION + 1)
        read = Plan.from_data({**plan, "version": PLAN_VERSION})
        assert read.refinement is None
        assert not read.sites[0].gathered
        del plan["notes"]  # which has no default
        with pytest.raises(LowRankError, match="plan lacks 'notes'"):
            Plan.from_data({**plan, "version": PLAN_VERSION})
    with pytest.raises(LowRankError, match=rf"version {PLAN_VERSION} is expected, .* {PLAN_VERSION + 1}.*upgrade"):
        Plan.from_data({**plan, "version": PLAN_VERSION + 1})


# ---- the schema ------------------------------------------------------------------------------------------------------

CURRENT = [folder for folder in FOLDERS if folder.parent.parent.name == f"v{FORMAT}"]


def test_the_schema_is_one_and_speaks_of_this_version() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["format"] == {"const": FORMAT}
    assert SCHEMA["$defs"]["plan"]["properties"]["version"] == {"const": PLAN_VERSION}
    assert SCHEMA["$defs"]["site"]["properties"]["form"]["enum"] == [DENSE, *FORMS]
    assert SCHEMA["$defs"]["value"]["oneOf"][0]["properties"]["tensor"]["prefixItems"][0]["enum"] == sorted(_DTYPES)


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("plan", Plan),
        ("site", SitePlan),
        ("totals", Totals),
        ("metric", MetricSearch),
        ("refinement", Refinement),
        ("file", WeightFile),
        ("base", BaseWeight),
        ("timing", PairedTiming),
        ("speed", SiteSpeed),
    ],
)
def test_the_schema_knows_every_field(place: str, kind: Any) -> None:
    """Who adds a field adds it to the schema."""
    described = SCHEMA["$defs"][place]
    known = {each.name for each in fields(kind)} | ({"version"} if kind is Plan else set())
    assert set(described["properties"]) == set(described["required"]) == known


def test_the_schema_knows_the_fields_of_what_has_no_place_of_its_own() -> None:
    points = SCHEMA["$defs"]["metric"]["properties"]["points"]["items"]["properties"]
    curve = SCHEMA["$defs"]["plan"]["properties"]["curve"]["items"]["properties"]
    assert set(points) == {each.name for each in fields(MetricPoint)}
    assert set(curve) == {each.name for each in fields(TradeOff)}
    captured = SCHEMA["properties"]["captured"]["anyOf"][0]["properties"]
    assert set(captured) == {each.name for each in fields(Captured)}
    assert set(SCHEMA["properties"]) == {each.name for each in fields(Manifest)} - {"files"} | {"format", "weights"}


def perplexity(model: object) -> float:
    return 4.5


@pytest.mark.parametrize(
    "target",
    [
        Tolerance(0.2),
        Keep(params=0.5),
        Keep(flops=0.5),
        Keep(latency=0.5),
        Keep(params=1, of="sites", regauge=True),
        Metric(perplexity, 0, higher_is_better=False),
        Metric(perplexity, 0.5, of="params", evaluations=3),
    ],
    ids=str,
)
def test_every_target_is_of_the_schema(target: Target) -> None:
    kinds = SCHEMA["$defs"]["target"]["oneOf"][1]["properties"]["quantity"]["enum"]
    assert sorted(kinds) == sorted(get_args(CostKind))
    data = json.loads((CURRENT[0] / PLAN_FILE).read_text())
    plan = replace(Plan.from_data(data["plan"]), target=target)
    data["plan"] = json.loads(plan.to_json())
    VALIDATOR.validate(data)
    assert Plan.from_data(data["plan"]) == plan
    data["plan"]["target"]["unknown"] = 1
    assert not VALIDATOR.is_valid(data)
    with pytest.raises(LowRankError, match="unknown"):
        Plan.from_data(data["plan"])


@pytest.mark.parametrize("folder", CURRENT, ids=name_of)
def test_every_saved_folder_is_of_the_schema(folder: Path) -> None:
    VALIDATOR.validate(json.loads((folder / PLAN_FILE).read_text()))


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON value, itself apart; of a list only the first two entries."""
    keys = list(data) if isinstance(data, dict) else range(min(len(data), 2)) if isinstance(data, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(data[key], (*path, key))


def broken(data: Any) -> Iterator[Any]:
    """The data with one place of another type, one field less, one more."""
    for path in places(data):
        for change in ("other", "none", "less", "more"):
            made = copy.deepcopy(data)
            owner = made
            for key in path[:-1]:
                owner = owner[key]
            if change == "less":
                if not isinstance(owner, dict):
                    continue
                del owner[path[-1]]
            elif change == "more":
                if not isinstance(owner[path[-1]], dict):
                    continue
                owner[path[-1]]["unknown"] = 1
            else:
                owner[path[-1]] = None if change == "none" else [True, 7]
            yield made


@pytest.mark.parametrize("kind", ["regauged"])
def test_what_the_schema_rejects_the_reader_rejects(kind: str, tmp_path: Path) -> None:
    """The reader is at least as strict; and the schema rejects nearly all that it does."""
    data = json.loads((GOLDEN / f"v{FORMAT}" / kind / "saved" / PLAN_FILE).read_text())
    data["base"] = dict(list(data["base"].items())[:2])
    data["plan"]["curve"] = data["plan"]["curve"][:1]
    rejected = accepted = 0
    for made in broken(data):
        (tmp_path / PLAN_FILE).write_text(json.dumps(made))
        valid = VALIDATOR.is_valid(made)
        try:
            read_manifest(tmp_path)
        except LowRankError:
            rejected += 1
            accepted += valid
        else:
            assert valid, next(iter(VALIDATOR.iter_errors(made))).message
    assert rejected > 300
    assert accepted <= 6  # names in one place that another place does not know
