"""How fast are whole models: eager, compiled, factored, folded back, and in onnxruntime?

Each model at batch 1 and 16, calibrated with batches of that size, and every time taken in paired turns against the
compiled original. The weights of all but the sentence encoder are random, for speed does not depend on them; what does
is the plan, and a plan for a random model is of the same size. Plans are made with a low effort, which changes what
they keep of the outputs and not what they cost.

The page goes to results/models.md, the chart to results/models.svg; ``--only`` measures some sections again and leaves
the others as they are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import charts
import common
import torch
from torch import Tensor, nn

from lowrank_fx import Keep, LowRankModule, Metric, Tolerance, optimize
from lowrank_fx._render import percent
from lowrank_fx.compiling import compile_module
from lowrank_fx.demo import load_encoder
from lowrank_fx.latency import PairedTiming, paired_speedup
from lowrank_fx.targets import Target

BATCHES = (1, 16)
CALIBRATION = 8
"""Batches that calibrate."""

SHARE = 0.5
OF_IDEAL = 0.85
"""What is asked of MiniLM and DeiT-small at batch 16: measured speed-up over that of the FLOPs."""

NEVER_SLOWER = 0.98
"""A speed-up is at least 1 within noise if it is above this: what two timings of one model differ by here."""

ASKED = ("minilm", "deit_small")


@dataclass(frozen=True)
class Case:
    """A model and what calls it: a maker of one batch from a size and a generator."""

    model: nn.Module
    batch: Callable[[int, torch.Generator], Any]


def minilm() -> Case:
    """The sentence encoder, 32 tokens."""
    model, _ = load_encoder()
    return Case(model, _tokens(30000, 32, mask=True))


def deit_small() -> Case:
    """DeiT-small at 224 x 224."""
    return _timm("deit3_small_patch16_224", 224)


def resnet50() -> Case:
    """ResNet-50 at 224 x 224."""
    return _timm("resnet50", 224)


def convnext() -> Case:
    """ConvNeXt-tiny at 224 x 224."""
    return _timm("convnext_tiny", 224)


def llama() -> Case:
    """A Llama of 4 layers of width 512, 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return Case(LlamaForCausalLM(config).eval(), _tokens(4096, 64, mask=False))


MODELS: Mapping[str, Callable[[], Case]] = {
    made.__name__: made for made in (minilm, deit_small, resnet50, convnext, llama)
}


def main() -> None:
    """Measure model by model, and write the page after each."""
    parser = common.option_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="sections to measure")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES), help="batch sizes (default: 1 16)")
    options = parser.parse_args()
    page = options.out / "models.md"
    sections = common.sections(page)
    for name in options.only:
        for batch in options.batch:
            facts = common.machine(options.date)
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                case = MODELS[name]()
            sections[f"{name}, batch {batch}"] = [*facts, "", *section(name, case, batch)]
            lines = ["# How fast whole models are", "", *common.paragraph(LEGEND), "", *picture(sections)]
            for title, text in sections.items():
                lines += ["", f"## {title}", "", *text]
            charts.bars(options.out / "models.svg", speeds(sections), "speed-up over the compiled original", level=1.0)
            common.publish(options.out, page.name, lines)


LEGEND = (
    "Speed-ups are against the original through torch.compile, medians of paired turns, without gradients. *Ideal*: "
    "FLOPs of the original over FLOPs of the plan. `Tolerance`, `Metric` and `Keep(latency=)` may not be slower than "
    f"the original: at least {NEVER_SLOWER:g} counts as equal, since two timings of one model differ by that much. "
    "*frozen=True* is against the same original, whose weights are not frozen. "
    "Onnxruntime runs the exported files on as many threads. *Seconds* are those of `optimize` or `replan`, with "
    '`effort="low"`, timing and compilation included.'
)


def section(name: str, case: Case, size: int) -> list[str]:
    """A row per way to run the model."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    loader = [case.batch(size, generator) for _ in range(CALIBRATION)]
    original, made, rows = Runner(case.model, loader[0]), None, []
    rows.append(_row("eager", original.against(case.model), None))
    for target in targets(case, loader):
        started = time.monotonic()
        if made is None:
            made = done = optimize(case.model, loader, target=target, effort="low", progress=False)
        else:
            done = made.replan(target)
        seconds = time.monotonic() - started
        timing = original.against(done._run) if done.plan.factored else None
        rows.append(_planned(str(target), name, size, done, timing, seconds))
        if done is made:
            frozen = LowRankModule(made.artifact, None, compile=True, frozen=True)
            rows.append(_row("the same, frozen=True", original.against(frozen._run), None))
            folded = made.fold()
            rows.append(_row("the same, folded", original.against(folded._run), None))
            rows += _onnx(original, made)
    dense = original.seconds
    header = ("", "speed-up", "IQR", "ideal", "of ideal", "FLOPs kept", "asked", "met", "seconds")
    return [f"The compiled original takes {1e3 * dense:.2f} ms.", "", *common.table(header, rows)]


def targets(case: Case, loader: Sequence[Any]) -> tuple[Target, ...]:
    """What is asked of a model; its metric is the agreement of its outputs with the original's on the last batch."""
    reference = _vector(case.model, loader[-1])

    def agreement(model: nn.Module) -> float:
        return float(nn.functional.cosine_similarity(_vector(model, loader[-1]), reference, dim=0))

    return (
        Keep(flops=SHARE),
        Tolerance(0.1),
        Metric(agreement, max_drop=0.01, evaluations=6),
        Keep(latency=0.9),
    )


class Runner:
    """The compiled original and one batch."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.batch = batch
        self.compiled = compile_module(model)
        self.seconds = 0.0

    def against(self, run: Callable[..., Any]) -> PairedTiming:
        """How much faster another callable is on the same batch."""
        with torch.no_grad():
            timing = paired_speedup(
                lambda: _called(self.compiled, self.batch), lambda: _called(run, self.batch), device="cpu"
            )
        self.seconds = timing.baseline_seconds
        return timing


def _onnx(original: Runner, made: LowRankModule) -> list[tuple[str, ...]]:
    """Rows of onnxruntime: the folded and the factored file."""
    import onnxruntime

    rows = []
    values = list(original.batch.values()) if isinstance(original.batch, dict) else [original.batch]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for fold, said in ((True, "onnxruntime, folded"), (False, "onnxruntime, factored")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            made.export_onnx(path, fold=fold)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), values, strict=True)}
        rows.append(_row(said, original.against(lambda *_, s=session, f=feeds, **__: s.run(None, f)), None))
    return rows


def _planned(
    said: str, name: str, size: int, made: LowRankModule, timing: PairedTiming | None, seconds: float
) -> tuple[str, ...]:
    """The row of a plan; where the original came back, nothing is measured against itself."""
    kept = made.plan.totals.kept("flops", "model")
    ideal = 1 / kept
    if timing is None:
        return (f"{said}: the original", "1.00", "", "", "", percent(1.0), "1", common.met(True), f"{seconds:.0f}")
    flops = isinstance(made.plan.target, Keep) and made.plan.target.flops is not None
    of_ideal = timing.speedup / ideal
    asked, reached = "1", timing.speedup >= NEVER_SLOWER
    if flops:
        asked, reached = f"{OF_IDEAL:g} of ideal", of_ideal >= OF_IDEAL
    judged = not flops or (name in ASKED and size == max(BATCHES))
    return (
        said,
        f"{timing.speedup:.2f}",
        f"{timing.spread:.2f}",
        f"{ideal:.2f}",
        f"{of_ideal:.2f}",
        percent(kept),
        asked if judged else "",
        common.met(reached) if judged else "",
        f"{seconds:.0f}",
    )


def _row(said: str, timing: PairedTiming, ideal: float | None) -> tuple[str, ...]:
    return (said, f"{timing.speedup:.2f}", f"{timing.spread:.2f}", "", "", "", "", "", "")


# ---- the page --------------------------------------------------------------------------------------------------------


def picture(sections: Mapping[str, Sequence[str]]) -> list[str]:
    """The chart's place on the page."""
    return [f"![speed-up over the compiled original, {len(sections)} models and batches](models.svg)"]


def speeds(sections: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """What the tables say, for the chart: speed-up by row, by section."""
    found: dict[str, dict[str, float]] = {}
    for title, text in sections.items():
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text if line.startswith("| ")]
        found[title] = {cells[0]: float(cells[1]) for cells in rows[2:] if cells[0]}
    return found


# ---- models and batches ----------------------------------------------------------------------------------------------


def _timm(name: str, size: int) -> Case:
    import timm

    model = timm.create_model(name).eval()
    return Case(model, lambda rows, generator: torch.randn(rows, 3, size, size, generator=generator))


def _tokens(vocabulary: int, length: int, *, mask: bool) -> Callable[[int, torch.Generator], Any]:
    def batch(rows: int, generator: torch.Generator) -> Any:
        ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if mask else {"input_ids": ids}

    return batch


def _called(run: Callable[..., Any], batch: Any) -> Any:
    return run(**batch) if isinstance(batch, dict) else run(batch)


def _vector(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        output = _called(model, batch)
    leaf = output if isinstance(output, Tensor) else output[0]
    assert isinstance(leaf, Tensor)
    return leaf.double().flatten()


if __name__ == "__main__":
    main()
