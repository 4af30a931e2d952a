"""The order of the house: a file imports only from files above it, and every file has its place."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The modules of lowrank_fx in the order data flows (ARCHITECTURE.md), read as one sequence: a module imports only
# from modules before it. A package stands where its __init__ belongs: before its modules when they rest on it
# (passes), behind them when it gathers them (planners).
HOUSE = (
    *("errors", "_env", "_progress", "_files", "_sizes", "_memory", "_ambient", "_describe", "_leaves"),
    *("linalg", "certificate", "moments", "exact_gram", "sparse_signs", "shrinking", "directions"),
    *("sketch", "grouped_sketch"),
    *("anchored", "cost", "allocate", "gauge"),
    *("patches", "sites", "forms.geometry", "forms.base", "forms.output"),
    *("forms.alternating", "forms.split", "forms.tucker", "forms", "targets", "plan"),
    *("loader_batch", "batches", "compare"),
    *("training_batches", "refine_options", "effort"),
    *("signature", "refusal", "hooks", "caches", "capture", "graph_operators", "graph_sites", "observer"),
    *("passes", "passes.verify", "passes.edit", "passes.base"),
    *("passes.constants", "passes.fold_constants", "passes.contraction", "passes.lower_einsum"),
    "passes.untie_embeddings",
    "passes.fold_batchnorm",
    "passes.observe_taps",
    *("passes.factorize_linear", "passes.factorize_regauged", "passes.factorize_conv", "passes.factorize_bmm"),
    *("passes.pack_shared_input", "passes.fold_factors"),
    *("site_graph", "passes.composition", "passes.merge_adapters", "passes.restore_pairs", "passes.merge_pairs"),
    "passes.order",
    *(
        "rewrite",
        "walk",
        "program",
        "compiling",
        "frozen",
        "program_module",
        "refine_loss",
        "judges",
        "kl",
        "losses",
        "fingerprint",
        "graph_program",
    ),
    *("modules", "attention", "attention_parts", "tree_sites", "tree_program"),
    *("latency", "weight_files", "_bundle", "cache", "calibration", "batch_runs", "calibration_run"),
    *("gradients", "double_sided", "curves", "effects", "study"),
    *("refit", "closed_loop", "norms", "corrections", "scored", "refine_roles", "refine"),
    *("planners.problem", "planners.budget", "planners.marginal", "planners.metric"),
    *("planners.energy", "planners.uniform", "planners"),
    *("timed_operators", "timing_cache", "timings", "fast_steps", "site_times", "account", "shared_inputs"),
    *("shared_groups", "offers"),
    *("factor_cache", "unfactored", "settle", "baseline", "session", "payoff", "measuring", "refinement"),
    *("folding", "pairs"),
    *("example_calls", "manifest", "transfer"),
    *("storage", "_render", "report"),
    *("export_inputs", "export_program", "export_parity", "export_to_onnx", "export_to_torch", "export"),
    "exporting",
    *("module", "arguments", "pipeline", "testing"),
    *("backend.options", "backend.attention", "backend.lowering", "backend.watch", "backend.roots", "backend.regions"),
    *("backend.recording", "backend.planning", "backend.saved", "backend.members", "backend.family"),
    *("backend.region", "backend"),
    *("comparison", "origin"),
    *("onnx_frontend.model", "onnx_frontend.sites", "onnx_frontend.rewrite", "onnx_frontend.runtime"),
    *("onnx_frontend.flops", "onnx_frontend.inputs", "onnx_frontend.operators"),
    *("onnx_frontend.derivatives", "onnx_frontend.program", "onnx_frontend.compress", "onnx_frontend"),
    *("demo.show", "demo.encoder", "demo.digits", "demo"),
    *("cli_options", "cli_saved", "cli_onnx", "cli", "__main__", "__init__"),
)


def modules_on_disk() -> dict[str, Path]:
    """The name each file has in ``HOUSE``, and the file."""
    found: dict[str, Path] = {}
    for folder, prefix in ((ROOT / "lowrank_fx", ""), (ROOT / "passes", "passes.")):
        for path in sorted(folder.rglob("*.py")):
            if folder.name == "lowrank_fx" and path.is_relative_to(folder / "passes"):
                continue
            name = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported_names(source: str, module: str, *, is_package: bool) -> Iterator[tuple[int, str, str | None]]:
    """Every import of a source text, also those inside of functions and under ``TYPE_CHECKING``.

    Args:
        source: the text of the module.
        module: its full name, such as ``lowrank_fx.passes.base``; relative imports start from it.
        is_package: whether the text is an ``__init__``.

    Yields:
        The line, the module that is imported, and the name taken from it (None for ``import module``).
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = len(parts) - node.level + is_package
                base = ".".join([*parts[:kept], *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, base, alias.name


def violations(name: str, source: str, house: tuple[str, ...], *, is_package: bool = False) -> list[str]:
    """What a module imports against the order of ``house``, a line of text each.

    Args:
        name: the module's name in ``house``.
        source: its text.
        house: the modules in their order.
        is_package: whether the text is a package's ``__init__``.

    Returns:
        One sentence for every import of the module itself, of a later one, or of one that ``house`` does not name; and,
        for a module of ``passes``, for every ``from lowrank_fx import ...``.
    """
    full = "lowrank_fx" if name == "__init__" else f"lowrank_fx.{name}"
    said = []
    for line, base, taken in imported_names(source, full, is_package=is_package or name == "__init__"):
        if base.split(".")[0] == "passes":
            said.append(f"{name}:{line} imports {base!r}; the passes are 'lowrank_fx.passes'")
            continue
        if base.split(".")[0] != "lowrank_fx":
            continue
        if base == "lowrank_fx" and name.split(".")[0] == "passes":
            said.append(f"{name}:{line} imports from 'lowrank_fx' itself; passes import 'lowrank_fx.<module>'")
            continue
        inner = base.removeprefix("lowrank_fx").removeprefix(".")
        # `from package import module` depends on the module, `from module import thing` on the module named first.
        candidate = f"{inner}.{taken}".removeprefix(".") if taken is not None else inner
        target = candidate if candidate in house else inner or "__init__"
        if target not in house:
            said.append(f"{name}:{line} imports {target!r}, which is not in HOUSE")
        elif house.index(target) >= house.index(name):
            said.append(f"{name}:{line} imports {target!r}, which is not above it in HOUSE")
    return said


def packages_on_disk() -> Iterable[str]:
    """The full name of every folder of modules, as it is when shipped."""
    for name, path in modules_on_disk().items():
        if path.name == "__init__.py":
            yield "lowrank_fx" if name == "__init__" else f"lowrank_fx.{name}"


def test_every_file_has_its_place_and_every_place_its_file() -> None:
    found = set(modules_on_disk())
    assert sorted(found - set(HOUSE)) == [], "files without a place: decide where in HOUSE they belong"
    assert sorted(set(HOUSE) - found) == [], "places in HOUSE without a file"
    assert len(set(HOUSE)) == len(HOUSE)


@pytest.mark.parametrize("name", sorted(modules_on_disk()))
def test_imports_point_up_the_list(name: str) -> None:
    if name not in HOUSE:
        pytest.fail(f"{name!r} has no place in HOUSE")
    path = modules_on_disk()[name]
    assert violations(name, path.read_text("utf-8"), HOUSE, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        ("cost", "from lowrank_fx.errors import PlanError\nfrom lowrank_fx import linalg\nimport torch", None),
        ("cost", "from lowrank_fx.sites import Site", "imports 'sites', which is not above it"),
        ("cost", "import lowrank_fx.sites", "imports 'sites', which is not above it"),
        ("cost", "from lowrank_fx import sites", "imports 'sites', which is not above it"),
        ("cost", "from . import sites", "imports 'sites', which is not above it"),
        ("cost", "from .sites import Site", "imports 'sites', which is not above it"),
        ("cost", "from lowrank_fx.cost import macs", "imports 'cost', which is not above it"),
        ("cost", "def f():\n    from lowrank_fx.sites import Site", "cost:2 imports 'sites'"),
        ("cost", "if TYPE_CHECKING:\n    from lowrank_fx.sites import Site", "cost:2 imports 'sites'"),
        ("cost", "from lowrank_fx.allocate import solve", "imports 'allocate', which is not above it"),
        ("cost", "from lowrank_fx.nowhere import thing", "imports 'nowhere', which is not in HOUSE"),
        ("cli", "from lowrank_fx import optimize", "imports '__init__', which is not above it"),
        ("rewrite", "from passes.base import Pass", "the passes are 'lowrank_fx.passes'"),
        ("rewrite", "from lowrank_fx.passes import base", None),
        ("passes.base", "from lowrank_fx.passes.verify import check_graph", None),
        ("passes.base", "from .verify import check_graph", None),
        ("passes.verify", "from lowrank_fx.passes import base", "imports 'passes.base', which is not above it"),
        ("passes.base", "from lowrank_fx import errors", "passes import 'lowrank_fx.<module>'"),
        ("passes.base", "from .. import errors", "passes import 'lowrank_fx.<module>'"),
        ("__init__", "from .pipeline import optimize", None),
    ],
)
def test_the_check_itself(name: str, source: str, told: str | None) -> None:
    said = violations(name, source, HOUSE)
    if told is None:
        assert said == []
    else:
        assert len(said) == 1
        assert told in said[0]


def test_passes_refuse_their_bare_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the passes of lowrank_fx were imported as 'passes'")
    assert "import them as 'lowrank_fx.passes'" in last


def test_every_package_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(packages_on_disk())
    assert settings["package-dir"] == {"lowrank_fx.passes": "passes"}


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in modules_on_disk().values()}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_link_leads_to_the_passes() -> None:
    link = ROOT / "lowrank_fx" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")
    assert link.resolve() == ROOT / "passes"
