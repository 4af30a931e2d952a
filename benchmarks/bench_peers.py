"""What do ``optimize`` and its peers need for one job, and what is left of the model?

The sentence encoder, 128 sentences of 32 tokens in batches of 4 as ptdeco's own example calibrates, no fine-tuning:
ptdeco 0.5.0 (falor by its threshold on the outputs' noise, dwain by its own with the mean squared error for a loss), a
plain truncated SVD of the weights at one share of every layer's break-even rank (what Greenformer's default does), and
``optimize`` at the size that each of them came to, with either effort. Every run is a process of its own, on one thread
(idle threads that spin would count as work); its seconds are CPU seconds of the whole process after the model is
loaded, its memory is the process's peak above that.

The page goes to results/peers.md, a section per setting of a peer, and is written after each run; the chart goes to
results/peers.svg. ``--only`` runs some peers again and leaves the others' sections as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_fx import Keep, cost, module, optimize
from lowrank_fx._render import percent
from lowrank_fx.demo import load_encoder
from lowrank_fx.effort import EffortName

SENTENCES, BATCH, TOKENS, TEST = 128, 4, 32, 600
FASTER = 5.0
"""How many times fewer CPU seconds than falor are asked for, at a better result."""

RUNS: Mapping[str, tuple[float, ...]] = {"falor": (0.003, 0.01), "dwain": (0.01, 0.05), "svd": (0.8, 0.5)}
"""Settings of the peers: thresholds on noise over signal, and of the SVD shares of weights."""

MIB = 1 << 20


class Encoder(nn.Module):
    """The sentence encoder as a function of token ids alone, which is all that falor can call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings ``[sentences, width]`` of ids ``[sentences, tokens]``; id 0 is padding."""
        vectors: Tensor = self.model(input_ids=ids, attention_mask=(ids != 0).long())
        return vectors


def main() -> None:
    """Run every method in a process of its own, and write the page after each."""
    parser = common.option_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="peers to run")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SETTING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    data = common.data_dir(parser, options.data_dir)
    if data is None:
        return
    if options.one is not None:
        print(json.dumps(run(data, options.one[0], float(options.one[1]))))
        return
    page = options.out / "peers.md"
    sections = common.sections(page)
    try:
        for method, setting in [(name, setting) for name in options.only for setting in RUNS[name]]:
            facts, rows = common.machine(options.date, threads=1), []
            for row in compared(data, method, setting):
                rows.append(row)
                sections[f"{method} {setting:g}"] = [*facts, "", *common.table(HEADER, rows)]
                common.write(page, page_of(sections))
    finally:
        import charts  # not before: Linux counts what a parent holds when it starts a process as part of its peak

        charts.dots(options.out / "peers.svg", dots(sections), "CPU seconds", "cosine to the original's embeddings")
    common.publish(options.out, page.name, page_of(sections))


def compared(data: Path, method: str, setting: float) -> Iterator[tuple[str, ...]]:
    """The row of a peer, and those of ``optimize`` at the size that it came to."""
    peer = in_fresh_process(data, method, setting)
    yield (f"{method} {setting:g}", *figures(peer), "", "", "", "")
    for effort in ("low", "high"):
        found = in_fresh_process(data, effort, peer["kept"])
        ratio, better = peer["seconds"] / found["seconds"], found["cosine"] > peer["cosine"]
        asked, reached = "", ""
        if (method, effort) == ("falor", "low"):
            asked, reached = f"{FASTER:g}x, better", common.met(ratio >= FASTER and better)
        yield (f"optimize, {effort}", *figures(found), f"{found['apart']:.1f}", f"{ratio:.1f}x", asked, reached)


HEADER = (
    *("method", "weights kept", "cosine", "CPU seconds", "peak MiB"),
    *("timing, apart", "fewer seconds", "asked", "met"),
)

LEGEND = (
    "all-MiniLM-L6-v2 with mean pooling, 128 sentences of STS-B train. *Weights kept*: of the encoder's linear layers. "
    f"*Cosine*: mean over {TEST} dev sentences that are not in train, to the original's embeddings. *CPU seconds*: "
    "capture, calibration, plan and rewrite; nothing is compiled. *Timing, apart*: CPU seconds in which `optimize` "
    "runs both models in turns afterwards, which are in no other column. *Peak MiB*: above what the loaded model takes."
)


def page_of(sections: Mapping[str, Sequence[str]]) -> list[str]:
    """The page: the legend, the chart's place and the sections."""
    lines = ["# The same job by others", "", *common.paragraph(LEGEND), ""]
    lines.append("![cosine by CPU seconds, a dot per run with the weights that it keeps](peers.svg)")
    for title, text in sections.items():
        lines += ["", f"## {title}", "", *text]
    return lines


def dots(sections: Mapping[str, Sequence[str]]) -> dict[str, list[tuple[float, float, str]]]:
    """What the tables say, for the chart: CPU seconds, cosine and weights kept by method."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for text in sections.values():
        for name, kept, cosine, seconds, *_ in common.cells_of(text):
            method = name if name.startswith("optimize") else name.split()[0]
            found.setdefault(method, []).append((float(seconds), float(cosine), kept))
    return found


def figures(found: dict[str, float]) -> tuple[str, str, str, str]:
    """The columns that every method has."""
    return percent(found["kept"]), f"{found['cosine']:.4f}", f"{found['seconds']:.1f}", f"{found['mib']:.0f}"


def in_fresh_process(data: Path, method: str, setting: float) -> dict[str, float]:
    """What one method needs and leaves."""
    return common.in_fresh_process(__file__, "--data-dir", str(data), "--one", method, repr(setting))


def run(data: Path, method: str, setting: float) -> dict[str, float]:
    """One method in this process."""
    torch.set_num_threads(1)
    encoder, tokenizer = load_encoder()
    model = Encoder(encoder).eval()
    sentences = common.unique_sentences(common.sentence_pairs(data, "train"))[:SENTENCES]
    batches = [_ids(tokenizer, sentences[at : at + BATCH]) for at in range(0, SENTENCES, BATCH)]
    test = _test(data, tokenizer)
    with torch.no_grad():
        before = torch.cat([model(ids) for ids in test])
    dense = _weights(model)
    loaded = _peak()
    started = time.process_time()
    with timing_apart() as apart:
        made = METHODS[method](model, batches, setting)
    seconds = time.process_time() - started - apart[0]
    peak = _peak()
    with torch.no_grad():
        after = torch.cat([made(ids) for ids in test])
    cosine = float(F.cosine_similarity(before.double(), after.double()).mean())
    kept = _weights(made) / dense
    return {"kept": kept, "cosine": cosine, "seconds": seconds, "apart": apart[0], "mib": (peak - loaded) / MIB}


@contextlib.contextmanager
def timing_apart() -> Iterator[list[float]]:
    """The CPU seconds in which ``optimize`` times what it made, in a list of one."""
    taken = [0.0]

    def measured(*arguments: Any) -> Any:
        started = time.process_time()
        try:
            return measure(*arguments)
        finally:
            taken[0] += time.process_time() - started

    measure = module.measure
    with patch.object(module, "measure", measured):
        yield taken


# ---- the methods -----------------------------------------------------------------------------------------------------


def ours(model: nn.Module, batches: list[Tensor], share: float, effort: EffortName) -> nn.Module:
    """``optimize`` at a share of the layers' weights; the pooler that nothing reads is no layer of the graph."""
    target = Keep(params=share, of="sites")
    return optimize(model, batches, target=target, effort=effort, compile=False, progress=False)


def falor(model: nn.Module, batches: list[Tensor], threshold: float) -> nn.Module:
    """ptdeco's falor: one data step per batch, one metric step, thresholds on the outputs' noise to signal."""
    from ptdeco.falor import decompose_in_place

    decompose_in_place(
        module=model,
        device=torch.device("cpu"),
        data_iterator=itertools.cycle(batches),
        proportion_threshold=1.0,
        nsr_final_threshold=threshold,
        kl_final_threshold=float("inf"),
        num_data_steps=len(batches),
        num_metric_steps=1,
        use_float64=True,
        use_mean=True,
        use_damping=True,
    )
    return model


def dwain(model: nn.Module, batches: list[Tensor], threshold: float) -> nn.Module:
    """ptdeco's dwain without fine-tuning; the loss is the squared distance to the original's embeddings."""
    from ptdeco.dwain import decompose_in_place

    with torch.no_grad():
        wanted = {id(ids): model(ids) for ids in batches}

    class Named(nn.Module):
        """Takes the batches that dwain gives."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            vectors: Tensor = self.inner(batch["ids"])
            return vectors

    def stream() -> Iterator[dict[str, Tensor]]:
        return ({"ids": ids, "wanted": wanted[id(ids)]} for ids in itertools.cycle(batches))

    def loss(batch: dict[str, Tensor], vectors: Tensor) -> Tensor:
        return F.mse_loss(vectors, batch["wanted"])

    decompose_in_place(
        module=Named(),
        device=torch.device("cpu"),
        data_iterator=stream(),
        loss_fn=loss,
        num_data_steps=len(batches),
        metric_iterator=stream(),
        num_metric_steps=1,
        nsr_final_threshold=threshold,
        ppl_diff_threshold=threshold,
        finetune_fn=lambda module, device, names: module,
    )
    return model


def svd(model: nn.Module, batches: list[Tensor], share: float) -> nn.Module:
    """Truncated SVD of every weight at ``share`` of its break-even rank; no data."""
    linears = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    for name, layer in linears:
        rank = max(1, int(share * cost.break_even_rank(layer.out_features, layer.in_features)))
        left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        first = nn.Linear(layer.in_features, rank, bias=False)
        second = nn.Linear(rank, layer.out_features)
        root = values[:rank].sqrt()
        with torch.no_grad():
            first.weight.copy_(root[:, None] * right[:rank])
            second.weight.copy_(left[:, :rank] * root)
            second.bias.copy_(layer.bias)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Sequential(first, second))
    return model


METHODS: Mapping[str, Callable[[nn.Module, list[Tensor], float], nn.Module]] = {
    "low": functools.partial(ours, effort="low"),
    "high": functools.partial(ours, effort="high"),
    "falor": falor,
    "dwain": dwain,
    "svd": svd,
}


# ---- what they share -------------------------------------------------------------------------------------------------


def _ids(tokenizer: Any, sentences: list[str]) -> Tensor:
    encoded = tokenizer(sentences, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


def _test(data: Path, tokenizer: Any) -> list[Tensor]:
    known = set(common.unique_sentences(common.sentence_pairs(data, "train")))
    fresh = [each for each in common.unique_sentences(common.sentence_pairs(data, "dev")) if each not in known][:TEST]
    return [_ids(tokenizer, fresh[at : at + 100]) for at in range(0, len(fresh), 100)]


def _weights(model: nn.Module) -> float:
    """Numbers in the matrices of the encoder's layers; embeddings and what nothing reads are left out."""
    named = dict(model.named_parameters()).items()
    return float(sum(value.numel() for name, value in named if value.dim() == 2 and ".layer." in name))


def _peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
