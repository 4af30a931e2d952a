"""What ``optimize`` returns: an ``nn.Module`` that is called like the original and holds factored weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from lowrank_fx import storage
from lowrank_fx._ambient import settled
from lowrank_fx.capture import preserved, unwrap
from lowrank_fx.corrections import Made
from lowrank_fx.errors import LowRankError, OptionError
from lowrank_fx.exporting import Exporting
from lowrank_fx.fingerprint import base_weights
from lowrank_fx.folding import FoldedSites, choose_sites, folded_plan
from lowrank_fx.frozen import Frozen
from lowrank_fx.latency import PairedTiming, paired_speedup
from lowrank_fx.measuring import freezing, refused_by_compile, share_of_sites, site_times
from lowrank_fx.payoff import settle
from lowrank_fx.plan import Plan
from lowrank_fx.program import Program
from lowrank_fx.program_module import ProgramModule
from lowrank_fx.refine_options import Refine
from lowrank_fx.refinement import refined_plan
from lowrank_fx.report import Report
from lowrank_fx.session import Session
from lowrank_fx.storage import Artifact
from lowrank_fx.targets import Metric, Target, asks_for_time, check_target, obeys_speed
from lowrank_fx.timings import SiteSpeed
from lowrank_fx.transfer import Before
from lowrank_fx.weight_files import MAX_SHARD_SIZE


class LowRankModule(Exporting, ProgramModule):
    """A model with factored layers: same inputs, same outputs and output classes, its own weights.

    Its parameters carry the original's fully qualified names; a factored layer ``layer.0.q`` has
    ``layer.0.q.factor_in`` and ``layer.0.q.factor_out`` (three factors: ``factor_mid`` too) in place of
    ``layer.0.q.weight``; layers with one first factor hold it once, under the name of the first of them. It trains,
    moves and saves like any module. A graph was captured in eval mode: ``train()`` sets the flag, but dropout stays off
    and batch norms stay folded; a module tree obeys it. Dtypes that ``forward`` itself spells out stay as captured:
    cast a model before optimizing it.

    Attributes:
        artifact: program, plan and timing.
        session: what replanning needs; None after ``load`` and ``fold``.
        compiled: whether forward goes through ``torch.compile``.
        frozen: whether it does so with the weights as constants, in calls without gradients.
    """

    def __init__(
        self,
        artifact: Artifact,
        session: Session | None,
        *,
        compile: bool,
        frozen: bool = False,
        clone: bool = True,
    ) -> None:
        super().__init__(artifact.program, compile=compile, frozen=frozen)
        self.artifact = artifact
        self.session = session
        self._clone = clone

    @property
    def plan(self) -> Plan:
        """The plan this model was made by."""
        return self.artifact.plan

    @property
    def timing(self) -> PairedTiming | None:
        """The measured speed against the original, or None if nothing was factored, and after ``fold``."""
        return self.artifact.timing

    def report(self) -> Report:
        """A row per layer, and what the whole plan costs and does; ``print`` it, or ask it ``to_html()``."""
        return Report(self.plan, self.timing, self.artifact.speeds)

    def replan(
        self, target: Target, *, refine: Refine | None = None, checkpoint: str | os.PathLike[str] | None = None
    ) -> LowRankModule:
        """The model for another target, from the same calibration: no data is read again.

        Args:
            target: what is asked for.
            refine: let the factors learn from the original on the calibration batches; see :func:`optimize`.
            checkpoint: a folder that keeps the state of refinement about every 30 seconds, in a folder of its own for
                each plan: the same call goes on from there after an interruption. Under a target that obeys a clock
                (``Tolerance``, ``Metric``, ``Keep(latency=share)``) the plan may come out another way after a restart,
                and refinement then begins anew.

        Raises:
            OptionError: ``refine`` is not legal, or ``checkpoint`` is given without it.
            StorageError: the checkpoint cannot be written, is damaged, or is of another run.
            LowRankError: this module was loaded or folded, so it has no calibration, or the original has changed since.
            TargetError: the target cannot be reached.
        """
        if self.session is None:
            raise LowRankError(
                "replan needs the calibration, which a loaded or folded module does not have; call optimize again"
            )
        if checkpoint is not None and refine is None:
            raise OptionError(
                f"checkpoint={os.fspath(checkpoint)!r} keeps the state of refinement; pass refine= with it"
            )
        with settled(self.session.program.device):
            return build(
                self.session,
                check_target(target),
                self.artifact,
                compile=self.compiled,
                frozen=self.frozen,
                clone=self._clone,
                refine=refine,
                checkpoint=checkpoint,
            )

    def fold(self, sites: FoldedSites = None) -> LowRankModule:
        """The same model with one dense operator per layer again, for runtimes that want it; shares no tensor.

        A pair whose middle value something else reads too stays as it is; the plan's notes say so. The plan keeps the
        forms and ranks, and tells the costs of what the model is now.

        Args:
            sites: patterns of layer names (``fnmatch``, as ``skip``), or a plan, for the layers that it leaves dense or
                does not hold; the others stay factored. None for every layer.

        Raises:
            OptionError: a pattern matches no factored layer.
        """
        source = self.artifact
        chosen = {name: site for name, site in choose_sites(source.sites, sites).items() if name not in source.folded}
        with settled(source.program.device):
            refused = source.program.unfoldable(chosen)
            folded = {name: site for name, site in chosen.items() if name not in refused}
            program = source.program.fold(folded) if folded else source.program.copy()
        plan = folded_plan(source.plan, folded, refused, source.folded)
        done = tuple(name for name in source.sites if name in folded or name in source.folded)
        speeds = {name: speed for name, speed in source.speeds.items() if name not in done}
        made = Artifact(program, plan, source.sites, source.base, None, done, speeds=speeds)
        return LowRankModule(made, None, compile=self.compiled, frozen=self.frozen)

    def save(self, folder: str | os.PathLike[str], *, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
        """Write ``plan.json`` and the weights into ``folder``; :func:`lowrank_fx.load` reads them back.

        Killed half-way, it leaves what was there before, or what is there now.

        Args:
            folder: the directory; made if it does not exist.
            max_shard_size: the weights are divided into files of at most this size, such as ``"5GB"`` or a number of
                bytes.

        Raises:
            OptionError: ``max_shard_size`` is no size.
            StorageError: the folder cannot be written.
        """
        storage.save(self.artifact, folder, max_shard_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> LowRankModule:
        source = self.artifact
        with settled(source.program.device):
            copied = replace(source, program=source.program.copy())
        made = LowRankModule(copied, self.session, compile=self.compiled, frozen=self.frozen, clone=self._clone)
        made.train(self.training)
        memo[id(self)] = made
        return made

    def __reduce__(self) -> Any:
        raise LowRankError("a LowRankModule is not pickled: use save(folder) and lowrank_fx.load(model, folder)")

    def __repr__(self) -> str:
        """One line: the target, how much is left, at what error."""
        totals, factored = self.plan.totals, len(self.plan.factored)
        return (
            f"LowRankModule({self.plan.target}: {factored} of {len(self.plan.sites)} layers factored"
            f"{f', {len(self.artifact.folded)} folded back' if self.artifact.folded else ''}, "
            f"{totals.kept('params', 'model'):.1%} of parameters, {totals.kept('flops', 'model'):.1%} of FLOPs, "
            f"error {self.plan.error:.3g})"
        )


def build(
    session: Session,
    target: Target,
    base: Artifact | None,
    *,
    compile: bool,
    clone: bool,
    frozen: bool | Literal["auto"] = False,
    refine: Refine | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> LowRankModule:
    """Plan, rewrite, refine, compile and measure.

    Args:
        session: the calibrated model.
        target: what is asked for.
        base: an earlier artifact of the same session, whose checksums must still hold; None for the first.
        compile: whether the result is compiled, and measured against the compiled original.
        clone: whether the result owns the tensors that are not factored.
        frozen: whether both are compiled with their weights as constants; ``"auto"`` if the original measured faster
            so. Single layers are timed without.
        refine: options of refinement, or None.
        checkpoint: a folder that keeps the state of refinement, or None.
    """
    check_refine(refine, clone=clone)
    checksums = base_weights(session.model)
    changed = [] if base is None else [name for name, entry in checksums.items() if base.base.get(name) != entry]
    if changed:
        raise LowRankError(
            f"{changed[0]!r} of the original model has changed since it was calibrated, so nothing that was measured "
            "holds for it; call optimize again"
        )
    cause = refused_by_compile(session, frozen=frozen is True) if compile else None
    compile = compile and cause is None
    said: list[str] = []
    if frozen == "auto":
        frozen = False
        if compile:
            frozen, word = freezing(session)
            said.append(word)
    by_time = asks_for_time(target)
    times = site_times(session, compiled=compile) if compile or by_time else None
    last: list[tuple[Made, LowRankModule]] = []

    def make(plan: Plan, chosen: Made, program: Program) -> LowRankModule:
        sites = {name: site for name, (site, _) in chosen.factored.items()}
        made = Artifact(program, plan, sites, checksums)
        return LowRankModule(made, session, compile=compile, frozen=bool(frozen), clone=clone)

    def unrefined(plan: Plan, chosen: Made) -> LowRankModule:
        return make(plan, chosen, chosen.into(session.program, clone=clone))

    def time_of(plan: Plan, chosen: Made) -> PairedTiming:
        last[:] = [(chosen, unrefined(plan, chosen))]
        return measure(session, last[0][1])

    own = session.aimed(target, times)
    if refine is not None and isinstance(target, Metric):
        own = replace(own, refines=True)
    speeds: Mapping[str, SiteSpeed] = {}
    timing: PairedTiming | None = None
    if obeys_speed(target):
        if times is not None:
            if by_time:
                times.share_of_sites = share_of_sites(session, times)
            times.survey()
        _, (plan, chosen, _), speeds, timing = settle(own, target, time_of)
    else:
        plan, chosen, _ = own.planned(target)
        speeds = times.speeds(plan) if times is not None else {}
    said += times.notes if times is not None else ()
    if cause is not None:
        said.append(f"it runs without torch.compile, which refuses this model: {cause}")
    plan = replace(plan, notes=(*said, *plan.notes))  # the reason why the original came back is the last one
    if refine is not None and chosen.factored:
        plan, program = refined_plan(session, plan, chosen, refine, checkpoint)
        made = make(plan, chosen, program)
    elif last and last[0][0] is chosen:
        made = last[0][1]
        made.artifact.plan = plan
    else:
        made = unrefined(plan, chosen)
    if chosen.factored:
        made.artifact.timing = timing if timing is not None else measure(session, made)
        made.artifact.plan = _freezing_noted(made, session)
    made.artifact.speeds = speeds
    own_sites, module = made.artifact.sites, made.artifact.program.module
    made.artifact.before = Before.of(session.program, own_sites, plan.factored, module)
    return made


def _freezing_noted(made: LowRankModule, session: Session) -> Plan:
    """The plan of a model that was measured, with a note where the original's weights could not be frozen."""
    original = session.compiled_original(frozen=True) if made.frozen else None
    if not isinstance(original, Frozen) or original.refused is None:
        return made.plan
    note = f"it was measured against the original compiled without frozen weights, because {original.refused}"
    return replace(made.plan, notes=(*made.plan.notes, note))


def check_frozen(frozen: object, *, compile: bool, measured: bool = False) -> None:
    """Check that ``frozen`` has a legal value, and goes with ``compile``.

    Args:
        frozen: what the user gave.
        compile: whether anything is compiled.
        measured: whether ``"auto"`` is legal, since there is an original to be measured.

    Raises:
        OptionError: it has not, or nothing is compiled.
    """
    if not isinstance(frozen, bool) and not (measured and isinstance(frozen, str) and frozen == "auto"):
        legal = "give True, False or 'auto'" if measured else "give True or False"
        raise OptionError(f"frozen={frozen!r}: {legal}")
    if frozen and not compile:
        raise OptionError(
            f"frozen={frozen!r} says how to compile, but compile=False; pass compile=True, or leave frozen out"
        )


def check_refine(refine: object, *, clone: bool) -> Refine | None:
    """Return ``refine`` if it holds options of refinement, or is None.

    Raises:
        OptionError: it is something else, or the result would share tensors that refinement changes.
    """
    if refine is None or (isinstance(refine, Refine) and clone):
        return refine
    if isinstance(refine, Refine):
        raise OptionError(
            f"refine={refine!r} changes biases and norms, which copy=False shares with the model; pass copy=True"
        )
    raise OptionError(f"refine={refine!r}: give Refine(), such as Refine(steps=500), or None")


def measure(session: Session, candidate: LowRankModule) -> PairedTiming:
    """Time a candidate, as users call it, against their own model, in paired turns, on the first calibration batch."""
    call = session.calibration.effect_batches[0].call.map(torch.clone)
    model = unwrap(session.model)
    baseline = session.compiled_original(frozen=candidate.frozen) if candidate.compiled else model
    program = candidate.artifact.program
    device = program.device
    with preserved(model), preserved(program.module), torch.no_grad():  # hooks of the user's must not see these runs
        return paired_speedup(
            lambda: baseline(*call.args, **call.kwargs), lambda: candidate(*call.args, **call.kwargs), device=device
        )
