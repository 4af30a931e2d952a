"""Where does the time of calibration and of solving go, and which ideas would shorten it?

- A profile of ``calibrate`` on a sentence encoder and on ResNet-50, and of the error curves that are solved for after
  it: the model's own operators against what observes them;
- the observers' products against a plain product of the same size, patches in blocks, the observer compiled;
- eigen-solves batched and in threads of their own; a randomised solver for large sides; what the curves hold.

All inputs are random: time does not depend on values, and where accuracy is measured the spectrum is given. Sentences
of decision that can depend on figures are written by the figures beside them. The page goes to results/solving.md;
``--only`` measures some sections again and leaves the others as they are.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple, ParamSpec, TypeVar

import common
import torch
from bench_calibration import image_model, prepare
from profiles import EIGEN, MODEL, OBSERVER, SENTENCES, Profile, encoder, profiled_calibration
from torch import Tensor

from lowrank_fx import exact_gram as exact
from lowrank_fx.certificate import gaussian
from lowrank_fx.exact_gram import BLOCK_ROWS, ExactGram
from lowrank_fx.latency import PairedTiming, paired_speedup
from lowrank_fx.linalg import symmetric_eigen
from lowrank_fx.moments import panels
from lowrank_fx.observer import MIN_ROWS
from lowrank_fx.patches import Patch

PICTURES = (2, 16)
"""Batches, and images in each, of ResNet-50's calibration."""

BLOCKS = ((4096, 384), (4096, 768), (1024, 1536), (1024, 4608))
"""Rows and length of a row of the blocks that an observer takes in: taps of transformers and of 3 x 3 convolutions."""

COMPILED = ((4096, 384), (1024, 1536))
"""As above, of the blocks that are compiled, which takes inductor long."""

CONVOLUTIONS = ((3, 224, 7, 2, 64), (64, 56, 3, 1, 64), (128, 28, 3, 1, 128))
"""Channels and side of the input, side and stride of the kernel, channels out; for 32 images each."""

SITES = ((12, 384), (6, 768), (4, 1536))
"""How many sites of which side are solved."""

SIDES = (1024, 2048, 4096)
SHARES = (16, 8, 4, 2)
"""The randomised solver is asked for m / share of the m directions; m / 2 is the break-even rank of a square layer."""

OVERSAMPLING, POWERS = 16, 2

WORTH = 1.1
"""An idea that gains less than this is not worth its code."""

ACCURATE = 0.01
"""Relative error that a curve may have."""

MIB = 1 << 20

P = ParamSpec("P")
T = TypeVar("T")


def main() -> None:
    """Measure section by section, and write the page after each."""
    parser = common.option_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each comparison (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    options = parser.parse_args()
    page = options.out / "solving.md"
    kept = common.sections(page)
    for name in options.only:
        title, text, measured = SECTIONS[name]
        print(f"{title} ...", flush=True)
        facts = common.machine(options.date)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            kept[title] = [*facts, "", *common.paragraph(text), "", *measured(options.seconds)]
        lines = ["# The time of calibration and solving, and ideas to shorten it", "", *common.paragraph(LEGEND)]
        for title, _, _ in SECTIONS.values():
            if title in kept:
                lines += ["", f"## {title}", "", *kept[title]]
        common.publish(options.out, page.name, lines)


LEGEND = (
    "Ratios are speeds with the idea over speeds without it (above 1 the idea is faster): the median of paired turns "
    f"± its standard error. An idea counts as worth building from {WORTH:g} on. What whole stages take stands in "
    "[calibration.md](calibration.md)."
)


# ---- profiles --------------------------------------------------------------------------------------------------------


def profiles(seconds: float) -> Iterator[str]:
    """Tables of the encoder, of ResNet-50 and of the encoder's error curves."""
    count, size, tokens = SENTENCES
    said = f"`calibrate` of all-MiniLM-L6-v2, {count} batches of {size} x {tokens} tokens"
    yield from _profile_lines(said, encoder().calibrating)
    model, images = image_model("resnet50")
    count, size = PICTURES
    batches = [batch[:size] for batch in images[:count]]
    _, found = profiled_calibration(prepare(model, batches), batches)
    yield from ("", *_profile_lines(f"`calibrate` of ResNet-50, {count} batches of {size} images", found), "")
    solving = encoder().solving
    said = (
        f"The error curves of all-MiniLM-L6-v2 in the bases of activations and gradients, {solving.whole:.2f} s. "
        f"Decision: eigen-solves take {solving.of(EIGEN) / solving.whole:.0%} of it; see below for those."
    )
    yield from (*common.paragraph(said), "", *solving.table())


def _profile_lines(said: str, found: Profile) -> Iterator[str]:
    observers, most = found.of(OBSERVER), found.largest(OBSERVER)
    text = (
        f"{said}, {found.whole:.2f} s: {found.of(MODEL) / found.whole:.0%} in {MODEL}, {observers / found.whole:.0%} "
        f"in the observers. Decision: among the observers' parts the {most.removeprefix(OBSERVER)} "
        f"({found.of(most) / found.whole:.0%} of all) would be the first to shorten."
    )
    yield from (*common.paragraph(text), "", *found.table())


# ---- observers -------------------------------------------------------------------------------------------------------


def products(seconds: float) -> Iterator[str]:
    """A row per size of block."""
    rows, whole, alone = [], [], []
    for count, dim in BLOCKS:
        x = torch.randn(count, dim)
        gram, plain = ExactGram(dim, x.device), partial(torch.mm, x.T, x)
        own = _paired(plain, partial(gram.take_in, x, float(x.abs().amax())), seconds)
        panel = _paired(plain, partial(_panel_products, x), seconds)
        rates = (f"{2e-9 * count * dim * dim / took:.0f}" for took in (own.baseline_seconds, own.candidate_seconds))
        rows.append((f"{count:,}", f"{dim:,}", *rates, _figure(own), _figure(panel)))
        whole.append(own.speedup)
        alone.append(panel.speedup)
    header = ("rows", "d", "plain, GFLOP/s", "observer, GFLOP/s", "ratio", "its products alone, ratio")
    yield from common.table(header, rows, left=0)
    yield from ("", *common.paragraph(gemm_decision(whole, alone)))


def _panel_products(x: Tensor) -> list[Tensor]:
    return [x[:, start:stop].T @ x[:, start:] for start, stop in panels(x.shape[1])]


def gemm_decision(whole: list[float], alone: list[float]) -> str:
    """What follows from the ratios of whole blocks, and of their products alone."""
    said = (
        f"Decision: blocks run at {min(whole):.2f} to {max(whole):.2f} of a plain product's speed, their products "
        f"alone at {min(alone):.2f} to {max(alone):.2f}. "
    )
    if min(whole) >= 1 / WORTH:
        return f"{said}That is GEMM speed: nothing to build."
    if min(alone) >= 1 / WORTH:
        return (
            f"{said}The products are at GEMM speed; the rest are passes over the rows and the sum, in float64 because "
            "bounds are certified by them. Compiling might shorten those, see below."
        )
    return f"{said}The products themselves are below GEMM speed: other panels would be the first to try."


def image_patches(seconds: float) -> Iterator[str]:
    """A row per convolution."""
    rows, found = [], []
    for channels, side, kernel, stride, out in CONVOLUTIONS:
        around = (kernel // 2, kernel // 2)
        own = Patch((kernel, kernel), (stride, stride), (around, around), (1, 1))
        x = torch.randn(32, channels, side, side)
        width, total = channels * kernel * kernel, own.rows(x)
        index = torch.randperm(total)[: max(MIN_ROWS, total * out // width)].sort().values
        gram = ExactGram(width, x.device)
        sizes = len(index), min(len(index), BLOCK_ROWS)
        at_once, in_blocks = (partial(_observe_patches, own, x, index, gram, size) for size in sizes)
        timing = _paired(at_once, in_blocks, seconds)
        shape = f"{channels} x {side} x {side}, {kernel} x {kernel} / {stride}"
        copies = (f"{4 * width * size / MIB:.0f} MiB" for size in sizes)
        rows.append((shape, f"{len(index):,}", *copies, _figure(timing)))
        found.append(timing.speedup)
    yield from common.table(("input, kernel / stride", "rows kept", "copy at once", "in blocks", "ratio"), rows)
    said = f"Decision: in blocks, at {min(found):.2f} to {max(found):.2f} of the speed; the copy stays bounded."
    yield from ("", *common.paragraph(said))


def _observe_patches(own: Patch, x: Tensor, index: Tensor, gram: ExactGram, most: int) -> None:
    for rows in own.blocks(x, index, most):
        gram.take_in(rows, 8.0)


def compiled(seconds: float) -> Iterator[str]:
    """A row per size of block."""
    rows, gains = [], []
    for count, dim in COMPILED:
        x = torch.randn(count, dim)
        eager, gram = Block.of(x), ExactGram(dim, x.device)
        block_work(eager, False)
        gram.take_in(x, float(x.abs().amax()))
        places = tuple(panels(dim))
        expected = [gram.gram()[start:, start:stop] for start, stop in places]
        _check(eager.sums, expected)
        ways, compiling = [], []
        for whole in (False, True):
            torch.compiler.reset()
            own, run = Block.of(x), torch.compile(block_work, dynamic=False)
            started = time.perf_counter()
            run(own, whole)
            compiling.append(f"{time.perf_counter() - started:.0f} s")
            _check(own.sums, expected)
            ways.append(_paired(partial(block_work, eager, False), partial(run, own, whole), seconds))
        took = f"{1000 * ways[0].baseline_seconds:.1f} ms"
        rows.append((f"{count:,}", f"{dim:,}", took, *map(_figure, ways), *compiling))
        gains.append(max(timing.speedup - timing.error for timing in ways))
    header = ("rows", "d", "eager", "as written", "for inductor", "to compile as written", "for inductor")
    yield from common.table(header, rows, left=0)
    yield from ("", *common.paragraph(compile_decision(gains)))


def compile_decision(gains: list[float]) -> str:
    """What follows from the better way's ratio, its standard error taken off, for each size."""
    said = f"Decision: the better way has {min(gains):.2f} to {max(gains):.2f} of the eager speed, standard errors off"
    if min(gains) >= WORTH:
        return f"{said}: worth building as an option, since each width has to be compiled first."
    if max(gains) >= WORTH:
        return f"{said}. Not built: not all widths gain, and each has to be compiled first, for a run of seconds."
    return f"{said}. Not built: the products are the library's in either case, and each width has to be compiled first."


class Block(NamedTuple):
    """A block of rows, and what it is added to.

    Attributes:
        rows: float32 ``[n, d]``.
        probes: float64 ``[d, p]``, the last column zeros.
        extra: float64 ``[2, d]``, two rows more.
        sums: float64, a tensor per panel of a triangle. In one matrix, compiled code would copy all of it.
        scale: what the rows are multiplied by.
    """

    rows: Tensor
    probes: Tensor
    extra: Tensor
    sums: tuple[Tensor, ...]
    scale: float

    @classmethod
    def of(cls, rows: Tensor) -> Block:
        """A block that has joined nothing."""
        dim = rows.shape[1]
        probes = gaussian(dim, exact._PROBES, dim)
        probes = torch.cat([probes, torch.zeros_like(probes[:, :1])], 1)
        sums = (torch.zeros(stop - start, dim - start, dtype=torch.float64) for start, stop in panels(dim))
        return cls(rows, probes, torch.zeros(2, dim, dtype=torch.float64), tuple(sums), 2.0**20)


def block_work(block: Block, whole: bool) -> tuple[Tensor, Tensor]:
    """What ``ExactGram._joined`` and ``_panel`` do to a block, without what they read on the host in between.

    Args:
        block: the block, whose sums change.
        whole: all rows become float64 at once, and products with few rows are written as sums, which inductor fuses.

    Returns:
        The Gram of the rows times the probes, transposed, and the rows' energy.
    """
    rows, probes, extra, _, scale = block
    count, dim = rows.shape
    origin = torch.mv(rows.T, torch.full((count,), scale / count))
    shifted = torch.add(-origin, rows, alpha=scale)
    origin = origin.double()
    probed = torch.zeros_like(probes.T, memory_format=torch.contiguous_format)
    energy = torch.zeros_like(probed[0, 0])
    for chunk in torch.split(rows, count if whole else max(1, exact._CHUNK_ELEMENTS // dim)):
        exactly = torch.add(-origin, chunk, alpha=scale)
        image = exactly @ probes
        image[:, -1] = 1.0
        probed.addmm_(image.T, exactly)
        energy += exactly.square().sum() if whole else torch.dot(exactly.flatten(), exactly.flatten())
    for total, (start, stop) in zip(block.sums, panels(dim), strict=True):
        panel = (shifted[:, start:stop].T @ shifted[:, start:]).double()
        if whole:
            first, second = (row[start:stop, None] * row[start:] for row in extra)
            total.add_(panel * scale**-2 + first + second)
        else:
            total.add_(panel.addmm_(extra[:, start:stop].T, extra[:, start:], beta=scale**-2))
    return probed, energy


def _check(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """The same Gram matrix but for float32 products summed in another order, and a mean that float32 rounds."""
    off = max(float((own - other).norm() / other.norm()) for own, other in zip(got, expected, strict=True))
    if not off <= 64 * torch.finfo(torch.float32).eps:
        raise AssertionError(f"the Gram matrices differ by {off:.1e}")


# ---- solving ---------------------------------------------------------------------------------------------------------


def eigen_solves(seconds: float) -> Iterator[str]:
    """A row per number and side of sites."""
    rows, batched, threaded = [], [], []
    for count, side in SITES:
        matrices = torch.randn(count, side, 2 * side, dtype=torch.float64) / torch.arange(1, 2 * side + 1).sqrt()
        matrices = matrices @ matrices.mT
        one, *others = (partial(solve, matrices) for solve in (_one_by_one, torch.linalg.eigh, _in_threads))
        ways = [
            paired_speedup(one, other, device="cpu", min_rounds=3, max_seconds=seconds, warmup=1) for other in others
        ]
        rows.append((str(count), f"{side:,}", f"{ways[0].baseline_seconds:.3f} s", *map(_figure, ways)))
        batched.append(ways[0].speedup - ways[0].error)
        threaded.append(ways[1].speedup - ways[1].error)
    yield from common.table(("sites", "side", "one by one", "batched", "a thread per site"), rows, left=0)
    solving = encoder().solving
    said = eigen_decision(batched, threaded, solving.of(EIGEN), solving.whole)
    yield from ("", *common.paragraph(said))


def _one_by_one(matrices: Tensor) -> list[Any]:
    return [torch.linalg.eigh(matrix) for matrix in matrices]


def _in_threads(matrices: Tensor) -> list[Any]:
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        made = list(pool.map(torch.linalg.eigh, matrices))
    torch.set_num_threads(threads)  # the process's own number was set with that of the pool's threads
    return made


def eigen_decision(batched: list[float], threaded: list[float], taken: float, whole: float) -> str:
    """What follows from both ways' ratios, standard errors taken off, and from the encoder's seconds."""
    ways = [
        f"{name} have {min(gains):.2f} to {max(gains):.2f} of the speed of the loop, standard errors off"
        for name, gains in (("Batched solves", batched), ("threads over sites", threaded))
    ]
    best = max(1.0, *(statistics.mean(gains) for gains in (batched, threaded)))
    decided = "worth building" if whole / (whole - taken * (1 - 1 / best)) >= WORTH else "not built"
    return (
        f"Decision: {decided}. {'; '.join(ways)}. The encoder's curves take {whole:.2f} s, {taken:.2f} s of them in "
        f"eigen-solves; at its mean ratio the better way would save {taken * (1 - 1 / best):.2f} s, once per session."
    )


def randomised(seconds: float) -> Iterator[str]:
    """A row per side, spectrum and rank."""
    rows: list[tuple[str, ...]] = []
    ratios, errors = defaultdict(list), defaultdict(list)
    for side in SIDES:
        turns = 3 if side <= 1024 else 1
        basis, _ = torch.linalg.qr(torch.randn(side, side, dtype=torch.float64))
        places = torch.arange(1, side + 1, dtype=torch.float64)
        for name, values in (("1 / i", 1 / places), (f"exp(-16 i / {side})", torch.exp(-16 * places / side))):
            matrix = (basis * values) @ basis.T
            exactly, whole = _timed(partial(symmetric_eigen, matrix), turns)
            for share in SHARES:
                rank = side // share
                found, taken = _timed(partial(range_finder, matrix, rank), turns)
                true = float(exactly[rank:].sum() / exactly.sum()) ** 0.5
                curve = max(0.0, 1 - float(found.sum() / matrix.trace())) ** 0.5
                ratios[share].append(whole / taken)
                errors[share].append(abs(curve / true - 1))
                figures = f"{whole / taken:.2f}", f"{true:.4f}", f"{errors[share][-1]:.1e}"
                rows.append((f"{side:,}", name, f"m / {share}", f"{whole:.2f} s", f"{taken:.2f} s", *figures))
    header = ("m", "eigenvalues", "k", "all", "randomised", "ratio", "curve at k", "relative error")
    yield from common.table(header, rows, left=2)
    yield from ("", *common.paragraph(randomised_decision(ratios, errors)))


def range_finder(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` largest eigenvalues of a positive semidefinite matrix ``[m, m]`` and their vectors, approximately.

    A randomised range finder with power iterations (N. Halko, P. G. Martinsson, J. A. Tropp, "Finding structure with
    randomness", SIAM Review 53, 2011, algorithm 4.4), and Rayleigh-Ritz in it.
    """
    basis = torch.randn(matrix.shape[0], rank + OVERSAMPLING, dtype=matrix.dtype)
    for _ in range(1 + POWERS):
        basis, _ = torch.linalg.qr(matrix @ basis)
    values, vectors = symmetric_eigen(basis.T @ matrix @ basis)
    return values[:rank], basis @ vectors[:, :rank]


def randomised_decision(ratios: Mapping[int, list[float]], errors: Mapping[int, list[float]]) -> str:
    """What follows from time ratios and relative errors, by share."""
    good = takewhile(lambda share: min(ratios[share]) >= WORTH and max(errors[share]) <= ACCURATE, SHARES)
    most, even = min(good, default=None), min(SHARES)
    small = f"At no k it is faster on every row and off by at most {ACCURATE:.0%}."
    if most is not None:
        small = (
            f"Up to k = m / {most} it is faster on every row ({min(ratios[most]):.2f} to {max(ratios[most]):.2f} times "
            f"there) and off by at most {ACCURATE:.0%}."
        )
    decided = "worth building for curves that end at break-even" if most == even else "not built"
    return (
        f"Decision: {decided}. {small} At k = m / {even}, up to which the planner asks for every curve, it has "
        f"{min(ratios[even]):.2f} to {max(ratios[even]):.2f} of the whole solve's speed and is off by up to "
        f"{max(errors[even]):.1e}. Linear layers in float32 are solved beyond that too, for re-gauged pairs, and the "
        "error of a basis of gradients is a sum over all directions."
    )


def _timed(run: Callable[[], tuple[Tensor, Tensor]], turns: int) -> tuple[Tensor, float]:
    """The eigenvalues, and the median seconds."""
    taken = []
    for _ in range(turns):
        started = time.perf_counter()
        values, _ = run()
        taken.append(time.perf_counter() - started)
    return values, statistics.median(taken)


def streamed(seconds: float) -> Iterator[str]:
    """What the encoder's curves hold."""
    solved = encoder()
    curves = [curve for site in solved.curves.values() for curve in site.forms.values()]
    values = (getattr(curve, field.name) for curve in curves for field in fields(curve))
    held = sum(value.nbytes for value in values if isinstance(value, Tensor))
    said = (
        f"Decision: kept in memory. The curves of the {len(solved.curves)} sites of all-MiniLM-L6-v2 hold "
        f"{held / MIB:.0f} MiB, its own weights {solved.weights / MIB:.0f} MiB; to solve again would take "
        f"{solved.solving.whole:.1f} s for each new target."
    )
    if held > solved.weights:
        said += " That is more than the weights: where memory is short, bases would be the first to write to files."
    yield from common.paragraph(said)


# ---- the page --------------------------------------------------------------------------------------------------------


def _paired(baseline: Callable[[], object], candidate: Callable[[], object], seconds: float) -> PairedTiming:
    # A single thread's own time leaves out what else the machine does.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    return paired_speedup(baseline, candidate, device="cpu", min_rounds=5, max_seconds=seconds, clock=clock)


def _figure(timing: PairedTiming) -> str:
    return f"{timing.speedup:.2f} ± {timing.error:.2f}"


PROFILES = (
    "Shares of the calling thread's time under torch's profiler, after a warm-up. An operator counts for the innermost "
    "of the package's functions around it. *The model's own operators* include held-out batches, which nothing "
    "observes, and the graph's own steps; *Python*: what is in no operator."
)
PRODUCTS = (
    "A block of rows that an observer takes in, against a float32 product of the block with itself; both counted as "
    "2 rows d^2 FLOPs. An observer computes a triangle in panels (7/12 of that), shifts the rows, sums in "
    "float64 and measures the rounding by float64 probes."
)
PATCHES = (
    "The patches that calibration keeps of 32 images, and their second moment: all patches gathered at once against "
    f"{BLOCK_ROWS:,} of them at a time. *Copy*: the memory of the gathered patches."
)
COMPILING = (
    "The work of a block (shift, conversion, probes, products, sum in float64) as one function of tensors, through "
    "`torch.compile`. The methods themselves read numbers on the host in between, and each reading would end a "
    "compiled region. *As written*: rows become float64 a chunk at a time; *for inductor*: all at once, and "
    "elementwise wherever that lets it fuse."
)
EIGENS = (
    "Symmetric eigen-solves in float64, values and vectors. *One by one*: each with all threads, as the package does. "
    "*Batched*: one call. *A thread per site*: a pool of as many threads, each solve on one of them."
)
RANDOMISED = (
    "The k largest eigenvalues of an output's second moment and their vectors, by a randomised range finder (Halko, "
    f"Martinsson, Tropp 2011; oversampling {OVERSAMPLING}, {POWERS} power iterations) against all of them; one run "
    "each above m = 1,024. *Curve at k*: the square root of what is beyond k over the trace. The randomised solver "
    "takes that from the trace and the values that it found, which never exceed the true ones: it is never too low."
)
STREAMED = (
    "The curves of all sites are kept after solving, since `replan` takes any site at any rank from them; a stream of "
    "results would have to be written and read back."
)

SECTIONS: dict[str, tuple[str, str, Callable[[float], Iterator[str]]]] = {
    "profile": ("Where the time goes", PROFILES, profiles),
    "products": ("The observers' products", PRODUCTS, products),
    "patches": ("im2col in blocks", PATCHES, image_patches),
    "compile": ("The observer compiled", COMPILING, compiled),
    "eigen": ("Eigen-solves batched, and in threads over sites", EIGENS, eigen_solves),
    "randomised": ("Randomised solves of large sides", RANDOMISED, randomised),
    "streamed": ("Results streamed", STREAMED, streamed),
}

if __name__ == "__main__":
    main()
