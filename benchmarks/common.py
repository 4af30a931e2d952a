"""What the benchmarks share: their options, the data, the facts about the machine, and the page a result is written to.

The models and the data are no part of the project. They lie in a folder beside it, and its own modules read them; where
it is not there, a benchmark says so, measures nothing and leaves the last results as they are.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx._files import write_atomic

HERE = Path(__file__).resolve().parent
DEFAULT_DATA = HERE.parent.parent / "shared" / "data"

sys.path.append(str(HERE.parent / "tests"))  # models that tests and benchmarks share
import torchvision_operators  # noqa: E402, F401 - timm and transformers ask for them

CALIBRATION_SENTENCES = 1500
BATCH = 32
TOKENS = 128

Batch = dict[str, Tensor]

TIMM_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "resnet50": {"zero_init_last": False},
    "convnext_tiny": {"ls_init_value": 1.0},
}
"""What timm's image models need so that every layer matters before training: as timm makes them, each branch is scaled
by 0 (ResNet-50, in its last batch norm) or 1e-6 (ConvNeXt, in its layer scale), and a plan may drop it at no error."""


# ---- options and data ------------------------------------------------------------------------------------------------


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir", type=Path, help="folder of models and data (default: ../shared/data beside the repository)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the page (default: results/)")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date on the page (default: today)")
    return parser


def data_dir(parser: argparse.ArgumentParser, given: Path | None) -> Path | None:
    """The data folder, or None, which is said, where none was given and the default does not exist."""
    if given is not None and not given.is_dir():
        parser.error(f"--data-dir {given} is not a folder")
    if given is None and not DEFAULT_DATA.is_dir():
        print("skipped: there is no data folder (--data-dir), so nothing was measured and no page written")
        return None
    return given or DEFAULT_DATA


def data_module(data: Path, name: str) -> Any:
    """A module that lies in the data folder, such as ``data_io``, imported under its own name."""
    known: ModuleType | None = sys.modules.get(name)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, data / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{data / name}.py cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def unique_sentences(pairs: tuple[Any, list[str], list[str]]) -> list[str]:
    """Each sentence of (scores, first sentences, second sentences) once, in order."""
    return list(dict.fromkeys(pairs[1] + pairs[2]))


def sentence_pairs(data: Path, split: str) -> tuple[Any, list[str], list[str]]:
    """Human scores, first and second sentences of STS-B's ``train`` or ``dev`` split."""
    pairs: tuple[Any, list[str], list[str]] = data_module(data, "data_io").load_pairs(
        data / "sts" / f"stsb_{split}.tsv.gz"
    )
    return pairs


def token_batches(tokenizer: Any, sentences: Sequence[str]) -> list[Batch]:
    """Padded batches of token ids and masks, in order."""
    batches = []
    for start in range(0, len(sentences), BATCH):
        part = list(sentences[start : start + BATCH])
        encoded = tokenizer(part, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        batches.append({name: encoded[name] for name in ("input_ids", "attention_mask")})
    return batches


def calibration_batches(data: Path, tokenizer: Any) -> list[Batch]:
    """1,500 unlabelled training sentences in 47 batches, the same on every call."""
    sentences = unique_sentences(sentence_pairs(data, "train"))
    random.Random(0).shuffle(sentences)
    return token_batches(tokenizer, sentences[:CALIBRATION_SENTENCES])


def image_model(name: str) -> nn.Module:
    """A model of timm in eval mode with random weights, the same on every call, of which each layer matters."""
    import timm

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, **TIMM_OPTIONS.get(name, {}))
    return model.eval()


# ---- runs ------------------------------------------------------------------------------------------------------------


def in_fresh_process(script: str, *arguments: str) -> dict[str, float]:
    """The figures that a script prints as JSON in its last line, from a process of its own on one thread.

    Threads that wait for each other spin, and would count as CPU seconds.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, script, *arguments]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    print(f"{' '.join(arguments)}: {found}", file=sys.stderr, flush=True)
    return found


def onnx_options() -> Any:
    """Options of an onnxruntime session on as many threads as torch has, which sleep while they wait.

    By default they spin on after a run, into the turn of what it is compared with.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


# ---- the page --------------------------------------------------------------------------------------------------------


def machine(date: str, threads: int | None = None) -> list[str]:
    """What the figures depend on besides the code.

    Args:
        date: of the run.
        threads: that compute; by default as many as torch has in this process.
    """
    count = torch.get_num_threads() if threads is None else threads
    plural = "" if count == 1 else "s"
    return paragraph(
        f"{date}; {_processor()}, {os.cpu_count()} logical CPUs, {count} thread{plural}, load average "
        f"{os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, torch {torch.__version__}, "
        f"lowrank_fx {lowrank_fx.__version__}."
    )


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A markdown table whose source reads as a table too.

    Args:
        header: the columns' names.
        rows: cells, as many per row.
        left: so many columns from the left are aligned left, the others right.
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            f"{cell:<{width}}" if column < left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return [line(header), line(rule), *map(line, rows)]


def paragraph(text: str) -> list[str]:
    """Text as lines of a page."""
    return textwrap.wrap(text, 120)


def publish(folder: Path, name: str, lines: Sequence[str]) -> None:
    """Print a page and write it to ``name`` in ``folder``, which is made if it does not exist."""
    print("\n".join(lines) + "\n")
    write(folder / name, lines)


def write(path: Path, lines: Sequence[str]) -> None:
    """Write a page, or the part of it that is known so far, whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def sections(page: Path) -> dict[str, list[str]]:
    """The sections of the last page, by title."""
    found: dict[str, list[str]] = {}
    lines: Sequence[str] = page.read_text().splitlines() if page.exists() else ()
    for line in lines:
        if line.startswith("## "):
            title = line.removeprefix("## ")
            found[title] = []
        elif found:
            found[title].append(line)
    return {title: text[1:-1] if text and not text[-1] else text[1:] for title, text in found.items()}


def cells_of(text: Sequence[str]) -> list[list[str]]:
    """The rows of the one table in a section, without its header."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text if line.startswith("| ")]
    return rows[2:]


def met(reached: bool) -> str:
    """How a column says whether a figure is within what was asked."""
    return "yes" if reached else "NO"
