"""Does what is exported compute what the model does, how large is it, and how fast does onnxruntime run it?

Architectures with random weights at small inputs, and all-MiniLM-L6-v2, each as it was, factored and folded. What the
files compute is compared with the model itself on held-out rows by the export, and here once more at the two batch
sizes that are timed. No data folder is needed.

The page goes to results/export.md.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import onnxruntime
import torch
from torch import Tensor, nn

from lowrank_fx import Keep, LowRankModule, optimize
from lowrank_fx._leaves import tree_leaves
from lowrank_fx.compare import relative_error
from lowrank_fx.export import Exported, export_onnx
from lowrank_fx.latency import paired_speedup
from lowrank_fx.storage import Artifact

SIZES = (1, 8)
TOLERANCE = 1e-5
TARGET = Keep(params=0.7, of="sites")
SENTENCES = 5 * 32

MODELS = {
    "all-MiniLM-L6-v2": "minilm",
    "GPT-2, 2 layers": "gpt2",
    "Llama, 2 layers": "llama",
    "T5 encoder, 2 layers": "t5_encoder",
    "ResNet-18": "resnet18",
    "ConvNeXt femto": "convnext_femto",
    "ViT tiny": "vit_tiny",
    "LSTM classifier": "lstm_classifier",
}
"""What is exported: the title of its row, and its name in ``tests/zoo.py`` where it has one."""


@dataclass(frozen=True)
class Run:
    """One model at one batch size.

    Attributes:
        rows: the batch size.
        seconds: of one run by onnxruntime: as it was, factored, folded.
        errors: of the factored and the folded file, relative L2 over all floating outputs, against the model itself.
    """

    rows: int
    seconds: tuple[float, float, float]
    errors: tuple[float, float]


@dataclass(frozen=True)
class Findings:
    """One model: its three files, and its runs."""

    factored: int
    sites: int
    files: tuple[Exported, Exported, Exported]
    runs: tuple[Run, ...]


def main() -> None:
    """Export every model and write the page."""
    parser = common.option_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=MODELS.values(), help="these; nothing is written")
    options = parser.parse_args()
    lines = ["# Export", "", *common.machine(options.date), ""]
    found: dict[str, Findings] = {}
    for title, name in MODELS.items():
        if options.only and name not in options.only:
            continue
        found[title] = measured(*subject(name))
        print("\n".join(str(file) for file in found[title].files), flush=True)
    lines += page(found)
    if options.only:
        print("\n".join(lines))
    else:
        common.publish(options.out, "export.md", lines)


def subject(name: str) -> tuple[nn.Module, list[Any]]:
    """A model in eval mode, and five batches of at least eight rows."""
    if name == "minilm":
        from lowrank_fx.demo import load_encoder
        from lowrank_fx.demo.encoder import demo_sentences

        model, tokenizer = load_encoder()
        return model, common.token_batches(tokenizer, demo_sentences()[0][:SENTENCES])
    import zoo

    zoo.ZOO["t5_encoder"] = zoo.hf_entry("T5EncoderModel", "T5Config", zoo.padded, **zoo._T5)
    return zoo.make(name)


def measured(model: nn.Module, batches: list[Any]) -> Findings:
    """Factor a model, write its three files, and run them."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        made = optimize(model, batches, target=TARGET, planner="uniform", compile=False, progress=False)
        assert made.session is not None
        dense = Artifact(made.session.program, made.plan, {}, {})
        paths = [Path(folder, f"{name}.onnx") for name in ("dense", "factored", "folded")]
        files = (
            export_onnx(dense, paths[0], session=made.session),
            made.export_onnx(paths[1]),
            made.export_onnx(paths[2], fold=True),
        )
        runs = tuple(timed(made, files, cut(batches[-1], rows), rows) for rows in SIZES)
    return Findings(len(made.plan.factored), len(made.plan.sites), files, runs)


def cut(batch: Any, rows: int) -> dict[str, Tensor] | Tensor:
    """The first rows of a batch of the zoo."""
    if isinstance(batch, dict):
        return {name: value[:rows] for name, value in batch.items()}
    tensor: Tensor = batch[0] if isinstance(batch, tuple) else batch
    return tensor[:rows]


def timed(made: LowRankModule, files: Sequence[Exported], batch: dict[str, Tensor] | Tensor, rows: int) -> Run:
    """What onnxruntime takes for one batch, and how far it is from the model."""
    tensors = list(batch.values()) if isinstance(batch, dict) else [batch]
    feeds = {name: tensor.numpy() for name, tensor in zip(files[0].inputs, tensors, strict=True)}
    settings = common.onnx_options()
    settings.log_severity_level = 4
    sessions = [
        onnxruntime.InferenceSession(str(file.path), settings, providers=["CPUExecutionProvider"]) for file in files
    ]
    with torch.no_grad():
        errors = [
            relative_error(outputs(session.run(None, feeds)), outputs(_called(module, batch)))
            for session, module in zip(sessions[1:], (made, made.fold()), strict=True)
        ]
    dense, factored, folded = (partial(session.run, None, feeds) for session in sessions)
    pair, single = (paired_speedup(dense, other, device="cpu") for other in (factored, folded))
    seconds = (pair.baseline_seconds, pair.candidate_seconds, single.candidate_seconds)
    return Run(rows, seconds, (errors[0], errors[1]))


def outputs(given: Any) -> list[Tensor]:
    """The floating tensors among what a model or a session returned."""
    tensors = [torch.as_tensor(leaf) for leaf in tree_leaves(given) if not isinstance(leaf, int | float | None)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _called(module: nn.Module, batch: dict[str, Tensor] | Tensor) -> Any:
    return module(**batch) if isinstance(batch, dict) else module(batch)


# ---- the page --------------------------------------------------------------------------------------------------------


def page(found: dict[str, Findings]) -> list[str]:
    """The table and what explains it."""
    rows = []
    for title, each in found.items():
        for run in each.runs:
            worst = max(*run.errors, *(file.error for file in each.files[1:]))
            rows.append(
                [
                    title,
                    f"{each.factored} of {each.sites}",
                    str(run.rows),
                    *(f"{file.bytes / 1e6:.2f}" for file in each.files),
                    *(f"{error:.1e}" for error in run.errors),
                    common.met(worst <= TOLERANCE),
                    *(f"{1e3 * seconds:.2f}" for seconds in run.seconds),
                ]
            )
    header = ["model", "factored", "batch"]
    header += [f"MB {name}" for name in ("dense", "factored", "folded")]
    header += ["error factored", "error folded", f"<= {TOLERANCE:g}"]
    header += [f"ms {name}" for name in ("dense", "factored", "folded")]
    versions = f"onnxruntime {onnxruntime.__version__}, opset {next(iter(found.values())).files[0].opset}"
    return [
        *common.paragraph(
            f"`{TARGET}` without refinement, {versions}, CPU, float32, as many threads as torch. *Error*: "
            "relative L2 over all floating outputs, onnxruntime against the factored (or folded) model itself in "
            "eager mode; the column after it also holds what each export found on held-out rows at two batch sizes. "
            "*ms*: median of paired turns. All but MiniLM have random weights, and small configurations; what is "
            "no linear layer or convolution (the LSTM) is left alone."
        ),
        "",
        *common.table(header, rows),
    ]


if __name__ == "__main__":
    main()
