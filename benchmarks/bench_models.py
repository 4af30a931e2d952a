"""How fast are whole models: eager, compiled, factored, folded back, and in onnxruntime?

Each model at batch 1 and 16, calibrated with batches of that size, and every time taken in paired turns against the
compiled original; what is timed is the call that a user makes, binding included. The weights of all but the sentence
encoder are random. The speed of a plan does not depend on values, but the plan does: ``Keep(flops=)`` fixes what a plan
costs, trained or not, though not which layers pay for it; how much ``Tolerance``, ``Metric`` and ``Keep(latency=)``
take away from random weights says little of trained ones. Plans are made with a low effort.

The page goes to results/models.md, the chart to results/models.svg. The page is written after each row, so what was
measured stays where a later row fails; ``--only`` measures some sections again and leaves the others as they are.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lowrank_fx.errors import TargetError
from lowrank_fx.latency import PairedTiming, paired_speedup
from lowrank_fx.measuring import share_of_sites, site_times
from lowrank_fx.targets import Target

BATCHES = (1, 16)
CALIBRATION = 8
"""Batches that calibrate."""

SHARE = 0.5
OF_IDEAL = 0.85
"""What is asked of MiniLM and DeiT-small at batch 16: measured speed-up over that of the FLOPs."""

NEVER_SLOWER = 0.98
"""A speed-up is at least 1 within noise if it is above this: what two timings of one model differ by here."""

REACHABLE = "smallest reachable is "
"""What stands before the smallest reachable value in the message of a target that is out of reach."""

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
    return _timm("deit_small_patch16_224", 224)


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
    model: nn.Module = LlamaForCausalLM(config)
    return Case(model.eval(), _tokens(4096, 64, mask=False))


MODELS: Mapping[str, Callable[[], Case]] = {
    made.__name__: made for made in (minilm, deit_small, resnet50, convnext, llama)
}


def main() -> int:
    """Measure model by model, and write the page after each row.

    Returns:
        The exit status: 1 where a section could not be measured to its end.
    """
    parser = common.option_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="sections to measure")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES), help="batch sizes (default: 1 16)")
    options = parser.parse_args()
    page = options.out / "models.md"
    sections = common.sections(page)
    failed = []
    for name, batch in ((name, batch) for name in options.only for batch in options.batch):
        title = f"{name}, batch {batch}"
        try:
            for text in section(name, batch, common.machine(options.date)):
                sections[title] = text
                common.write(page, page_of(sections))
        except Exception:  # hours of other sections do not depend on this one
            traceback.print_exc()
            failed.append(title)
        charts.bars(options.out / "models.svg", speeds(sections), "speed-up over the compiled original", level=1.0)
        common.publish(options.out, page.name, page_of(sections))
    if failed:
        print(f"not measured to the end: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


LEGEND = (
    "Speed-ups are against the original through torch.compile, medians of paired turns, without gradients. *Ideal*: "
    "FLOPs of the original over FLOPs of the plan. `Tolerance`, `Metric` and `Keep(latency=)` may not be slower than "
    f"the original: at least {NEVER_SLOWER:g} counts as equal, since two timings of one model differ by that much; "
    "*the original* says that it came back, measured like the others. *Out of reach*: `optimize` raises `TargetError` "
    "and returns nothing. *frozen=True* is against the same original, whose weights are not frozen. "
    "Onnxruntime runs the exported files on as many threads. *Seconds* are those of `optimize` or `replan`, with "
    '`effort="low"`, timing and compilation included. Weights are random but for minilm: what `Tolerance`, `Metric` '
    "and `Keep(latency=)` keep of them says little of trained ones."
)

CUT_OFF = "**Measuring was cut off here.**"

Row = tuple[str, ...]


def section(name: str, size: int, facts: Sequence[str]) -> Iterator[list[str]]:
    """The section of a model as it grows: after each row, and when all are there."""
    torch.compiler.reset()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        case = MODELS[name]()
    generator = torch.Generator().manual_seed(0)
    loader = [case.batch(size, generator) for _ in range(CALIBRATION)]
    original = Runner(case.model, loader[0])
    rows: list[Row] = []
    header = ("", "speed-up", "IQR", "ideal", "of ideal", "FLOPs kept", "asked", "met", "seconds")

    def text() -> list[str]:
        said = f"The compiled original takes {1e3 * original.seconds:.2f} ms{original.at_best}."
        return [*facts, "", *common.paragraph(said), "", *common.table(header, rows)]

    for row in measured(name, size, case, loader, original):
        rows.append(row)
        print(*row[:3], sep="  ", flush=True)
        yield [*text(), "", CUT_OFF]
    yield text()


def measured(name: str, size: int, case: Case, loader: Sequence[Any], original: Runner) -> Iterator[Row]:
    """A row per way to run the model."""
    made: LowRankModule | None = None
    yield _row("eager", original.against(case.model))
    for target in targets(case, loader):
        started = time.monotonic()
        try:
            if made is None:
                done = optimize(case.model, loader, target=target, effort="low", progress=False)
            else:
                done = made.replan(target)
        except TargetError as error:
            yield _out_of_reach(target, error, time.monotonic() - started)
            continue
        seconds = time.monotonic() - started
        yield _planned(str(target), name, size, done, original.against(done), seconds)
        if made is None:
            made = done
            original.at_best = _at_best(made)
            frozen = LowRankModule(made.artifact, None, compile=True, frozen=True)
            yield _planned("the same, frozen=True", name, size, frozen, original.against(frozen), None)
            yield _row("the same, folded", original.against(made.fold()))
            yield from _onnx(original, made)


def targets(case: Case, loader: Sequence[Any]) -> tuple[Target, ...]:
    """What is asked of a model; its metric is the agreement of its outputs with the original's on the last batch."""
    reference = _vector(case.model, loader[-1])

    def agreement(model: nn.Module) -> float:
        return float(nn.functional.cosine_similarity(_vector(model, loader[-1]), reference, dim=0))

    return (
        Keep(flops=SHARE),
        Tolerance(0.1),
        Keep(latency=0.9),
        Metric(agreement, max_drop=0.01, evaluations=6),
    )


class Runner:
    """The compiled original and one batch.

    Attributes:
        batch: what is called with.
        compiled: the original.
        seconds: of one call of it, from the first comparison: nothing else has run in the process by then.
        at_best: how fast a plan's FLOPs let the model become, in words.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.batch = batch
        self.compiled = compile_module(model)
        self.seconds = 0.0
        self.at_best = ""

    def against(self, run: Callable[..., Any]) -> PairedTiming:
        """How much faster another callable is on the same batch."""
        with torch.no_grad():
            timing = paired_speedup(
                lambda: _called(self.compiled, self.batch), lambda: _called(run, self.batch), device="cpu"
            )
        self.seconds = self.seconds or timing.baseline_seconds
        return timing


def _at_best(made: LowRankModule) -> str:
    """What a plan would reach if its layers took as much less time as they have less FLOPs, and the rest as before."""
    session, kept = made.session, made.plan.totals
    assert session is not None
    share = share_of_sites(session, site_times(session, compiled=True))
    speedup = 1 / (1 - share + share * kept.kept("flops", "sites"))
    return (
        f", {share:.0%} of it in the layers that can be factored. If these took as much less time as they have less "
        f"FLOPs under {made.plan.target}, and all else as long as before, the model would be {speedup:.2f} times as "
        f"fast, {speedup * kept.kept('flops', 'model'):.2f} of ideal"
    )


def _onnx(original: Runner, made: LowRankModule) -> Iterator[Row]:
    """Rows of onnxruntime: the folded and the factored file."""
    import onnxruntime

    values = list(original.batch.values()) if isinstance(original.batch, dict) else [original.batch]
    options = common.onnx_options()
    for fold, said in ((True, "onnxruntime, folded"), (False, "onnxruntime, factored")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            made.export_onnx(path, fold=fold)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), values, strict=True)}
        yield _row(said, original.against(lambda *_, s=session, f=feeds, **__: s.run(None, f)))


def _planned(said: str, name: str, size: int, made: LowRankModule, timing: PairedTiming, seconds: float | None) -> Row:
    """The row of a plan; ``seconds`` are those of making it, where that was done for this row."""
    kept = made.plan.totals.kept("flops", "model")
    ideal = 1 / kept
    flops = isinstance(made.plan.target, Keep) and made.plan.target.flops is not None
    of_ideal = timing.speedup / ideal
    asked, reached = "1", timing.speedup >= NEVER_SLOWER
    if flops:
        asked, reached = f"{OF_IDEAL:g} of ideal", of_ideal >= OF_IDEAL
    judged = not flops or (name in ASKED and size == max(BATCHES))
    return (
        said if made.plan.factored else f"{said}: the original",
        f"{timing.speedup:.2f}",
        f"{timing.spread:.2f}",
        f"{ideal:.2f}",
        f"{of_ideal:.2f}",
        percent(kept),
        asked if judged else "",
        common.met(reached) if judged else "",
        "" if seconds is None else f"{seconds:.0f}",
    )


def _out_of_reach(target: Target, error: TargetError, seconds: float) -> Row:
    """The row of a target that no plan reaches: there is nothing to measure."""
    smallest = str(error).partition(REACHABLE)[2].partition(" (")[0]
    why = f"the smallest is {smallest}" if smallest else str(error).replace("|", "/")
    return (f"{target}: out of reach, nothing returned; {why}", "", "", "", "", "", "", "", f"{seconds:.0f}")


def _row(said: str, timing: PairedTiming) -> Row:
    return (said, f"{timing.speedup:.2f}", f"{timing.spread:.2f}", "", "", "", "", "", "")


# ---- the page --------------------------------------------------------------------------------------------------------


def page_of(sections: Mapping[str, Sequence[str]]) -> list[str]:
    """The page: the legend, the chart's place and the sections."""
    lines = ["# How fast whole models are", "", *common.paragraph(LEGEND), ""]
    lines.append(f"![speed-up over the compiled original, {len(sections)} models and batches](models.svg)")
    for title, text in sections.items():
        lines += ["", f"## {title}", "", *text]
    return lines


def speeds(sections: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """What the tables say, for the chart: speed-up by row, by section."""
    return {
        title: {said.partition(":")[0]: float(speed) for said, speed, *_ in common.cells_of(text) if speed}
        for title, text in sections.items()
    }


# ---- models and batches ----------------------------------------------------------------------------------------------


def _timm(name: str, size: int) -> Case:
    model = common.image_model(name)
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
    sys.exit(main())
