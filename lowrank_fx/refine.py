"""REFINE: a factored program learns from the original what it gives on the calibration batches. No labels.

Per step, on one batch, with y the original's outputs, z the values of its sites, and a hat for the factored program:

    loss = |y^ - y|^2 / |y|^2  +  blocks * mean over sites of |z^ - z|^2 / |z|^2

The first term is the square of the error that plans are compared by; the second one tells every layer what it should
give, whatever its scale. Where that error is not the L2 distance but the Kullback-Leibler divergence (``kl.py``), the
first term is the square of that; for a loss of the user's, which needs the loader's own batches and the model's own
classes, the L2 distance stands. Factors, biases and the parameters of norms learn (``refine_roles.py``); everything
else stays. Held-out batches decide which state is kept, by the error that was asked for, the one at the start among
them, so the result is never worse there than its start.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from lowrank_fx._ambient import recording, seeded
from lowrank_fx._bundle import read_bundle, write_bundle
from lowrank_fx._files import sha256_tensor
from lowrank_fx._progress import Progress
from lowrank_fx.batches import Call
from lowrank_fx.cache import CachedBatch
from lowrank_fx.calibration_run import CHECKPOINT_SECONDS, CHECKPOINT_SHARE
from lowrank_fx.capture import preserved
from lowrank_fx.effects import held_out_error
from lowrank_fx.errors import OptionError, StorageError
from lowrank_fx.fingerprint import call_checksum
from lowrank_fx.judges import Judge
from lowrank_fx.losses import LossMeasure
from lowrank_fx.program import Outputs, Program
from lowrank_fx.refine_loss import outputs_loss, sites_loss
from lowrank_fx.refine_options import Refine, callable_name
from lowrank_fx.refine_roles import is_factor, trained
from lowrank_fx.training_batches import ShuffledBatches, step_generator

FORMAT = 2
NAME = "refine"

EVALUATIONS = 20
"""How often a run looks at the held-out batches, where ``Refine.every`` does not say."""

LEAST_SIZE = 0.01
"""The least scale of a bias or of a norm's parameter."""

NOT_FINITE = "the loss or its gradient is not finite; a smaller lr may help"
NO_MEMORY = "memory ran out; a smaller batch may help"

LARGEST_SCALE = 2.0**16
"""By what the loss of a float16 model is multiplied at first, so that its gradients do not vanish."""


@dataclass(frozen=True)
class Refined:
    """What refinement did.

    Attributes:
        history: per look at the held-out batches: steps done, mean training loss since the last look, held-out error.
        start: held-out error before the first step.
        best: held-out error of the state that was kept.
        best_step: steps that state had done; 0 if no step helped.
        steps: steps that were done.
        seconds: what they took, interruptions left out.
        notes: why it ended early, if it did.
    """

    history: tuple[tuple[int, float, float], ...]
    start: float
    best: float
    best_step: int
    steps: int
    seconds: float
    notes: tuple[str, ...] = ()


def refine(
    original: Program,
    factored: Program,
    inputs: Sequence[Call],
    select: Sequence[CachedBatch],
    options: Refine,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Refined:
    """Refine a factored program in place.

    Its parameters keep their dtypes, devices, memory and ``requires_grad``. Where they are narrower than float32,
    float32 copies learn, and what is checked and kept is their rounding. The same programs, inputs, options and number
    of threads give the same result, bit by bit, on a CPU.

    Args:
        original: the captured model.
        factored: the same program with factors, which shares no tensor with anything (``factorize(clone=True)``).
        inputs: calibration batches, on the program's device, as the program takes them.
        select: held-out batches with the original's outputs.
        options: how.
        checkpoint: a folder where the state is kept about every 30 seconds. The same call goes on from there after an
            interruption, bit by bit as if there had been none; a finished one is read back.
        progress: show a progress bar with the loss for work over two seconds.

    Raises:
        CalibrationError: there are no inputs, or the outputs of the two programs cannot be compared.
        OptionError: ``augment`` returned something that is not a batch.
        StorageError: the checkpoint cannot be written, is damaged, or is of another run.
    """
    if not trained(factored):
        error = held_out_error(factored, select)
        return Refined((), error, error, 0, 0, 0.0, ("nothing was refined: there is no factor, bias or norm to learn",))
    wanted = {id(parameter): parameter.requires_grad for parameter in factored.module.parameters()}
    # Hooks of the user's must not see these runs.
    with torch.inference_mode(False), preserved(factored.module):
        try:
            run = _Run(original, factored, inputs, select, options, None if checkpoint is None else Path(checkpoint))
            return run.finish(progress)
        finally:
            for parameter in factored.module.parameters():
                parameter.requires_grad_(wanted[id(parameter)])
                parameter.grad = None


class _Run:
    """One refinement, between its first step and its last."""

    def __init__(
        self,
        original: Program,
        factored: Program,
        inputs: Sequence[Call],
        select: Sequence[CachedBatch],
        options: Refine,
        folder: Path | None,
    ) -> None:
        self.factored, self.select, self.options, self.folder = factored, select, options, folder
        self.judge = select[0].judge if select else None
        self.batches = ShuffledBatches(inputs, options.batch, options.seed)
        self.parameters = trained(factored)
        for parameter in factored.module.parameters():
            parameter.requires_grad_(False)
        self.masters = [_master(parameter) for parameter in self.parameters.values()]
        calls = [call for site in original.find_sites().sites for call in site.calls] if options.blocks else []
        self.turned = frozenset(call.node for call in calls if call.sequence_first)
        nodes = [call.node for call in calls]
        self.teacher, self.student = original.probed(nodes), factored.probed(nodes)
        self.source = self._source(inputs) if folder is not None else {}
        self.every = options.every or max(1, options.steps // EVALUATIONS)
        self.start = held_out_error(factored, select)
        self.best, self.best_step = self.start, 0
        self.kept = [parameter.detach().clone() for parameter in self.parameters.values()]
        self.step = 0
        self.losses: list[float] = []
        self.history: list[tuple[int, float, float]] = []
        self.notes: list[str] = []
        self.done, self.broken = self.start == 0, False
        halves = any(parameter.dtype == torch.float16 for parameter in factored.module.parameters())
        self.scale = LARGEST_SCALE if halves else 1.0
        self.before = 0.0
        self.optimizer, self.schedule = self._optimizer()
        self.due = 0.0
        if folder is not None and (folder / f"{NAME}.json").exists():
            difference = read_bundle(folder, NAME, FORMAT, self._restore)
            if difference is not None:
                raise StorageError(
                    f"{folder}: the checkpoint is of another run: its {difference} differ; use another folder, or "
                    "delete this one"
                )

    # ---- the steps -----------------------------------------------------------------------------------------------

    def finish(self, progress: bool) -> Refined:
        """All steps that are left; the best state is in the program then."""
        started = time.monotonic() - self.before
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        with Progress("refine", self.options.steps, progress) as bar:
            bar.advance(self.step)
            while not self.done:
                loss = self._advance()
                self.before = time.monotonic() - started
                if self.folder is not None and not self.broken and (self.done or time.monotonic() >= self.due):
                    self._write()
                bar.advance(note=f"loss {loss:.4g}, held-out error {self.best:.4g} (at the start {self.start:.4g})")
        with torch.no_grad():
            for parameter, kept in zip(self.parameters.values(), self.kept, strict=True):
                parameter.copy_(kept)
        return Refined(
            tuple(self.history), self.start, self.best, self.best_step, self.step, self.before, tuple(self.notes)
        )

    def _advance(self) -> float:
        """One step, and a look at the held-out batches where one is due; the training loss."""
        loss = self._attempt()
        if isinstance(loss, str):
            self.notes.append(f"refinement stopped at step {self.step + 1}: {loss}")
            self.done = True
            return math.nan
        self.step += 1
        self.losses.append(loss)
        last = self.step == self.options.steps
        if last or self.step % self.every == 0:
            error = held_out_error(self.factored, self.select)
            self.history.append((self.step, sum(self.losses) / len(self.losses), error))
            self.losses.clear()
            if error < self.best:
                self.best, self.best_step = error, self.step
                for kept, parameter in zip(self.kept, self.parameters.values(), strict=True):
                    kept.copy_(parameter.detach())
            self.done = last
            if not last and self._looks_since_best() >= self.options.most_looks:
                self.notes.append(
                    f"refinement ended at step {self.step} of {self.options.steps}: the held-out error had not "
                    f"fallen since step {self.best_step}"
                )
                self.done = True
        return loss

    def _looks_since_best(self) -> int:
        return sum(step > self.best_step for step, _, _ in self.history)

    def _attempt(self) -> float | str:
        """One step; the training loss, or why it cannot be done."""
        call, wanted = self._batch(), None
        try:
            # A model that draws random numbers draws the same on both sides, and others in the next step.
            with torch.no_grad(), seeded(self.factored.device, self.step):
                wanted, inner = self.teacher(call)
            return self._learn(call, wanted, inner)
        except (RuntimeError, MemoryError) as error:
            if _is_out_of_memory(error):
                self.broken = True  # the same call may go on from the last checkpoint where there is more memory
                return NO_MEMORY
            if wanted is None:
                raise
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            return f"the factored model cannot be differentiated: {said}"

    def _learn(self, call: Call, wanted: Outputs, inner: Mapping[str, Tensor]) -> float | str:
        """One step of the optimizer towards the original's outputs and the values of its sites."""
        with recording(), seeded(self.factored.device, self.step):
            given, inside = self.student(call)
            own = self.judge.loss(given, wanted, call.mask) if self.judge is not None else None
            loss = outputs_loss(given, wanted, call.mask) if own is None else own
            if self.options.blocks:
                loss = loss + self.options.blocks * sites_loss(inside, inner, call.mask, self.turned)
        if not loss.requires_grad:
            return "no gradient reaches what was factored; the model's forward may switch gradients off"
        value = float(loss.detach())
        if not math.isfinite(value):
            return NOT_FINITE
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss * self.scale, retain_graph=self.scale > 1)
            if self._take_gradients():
                break
            if self.scale <= 1:
                return NOT_FINITE
            self.scale /= 2  # a gradient of a float16 model went over its range
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters.values(), strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return value

    def _take_gradients(self) -> bool:
        """Hand the gradients to what learns; whether all of them are finite."""
        sound = torch.ones((), dtype=torch.bool, device=self.factored.device)
        for master, parameter in zip(self.masters, self.parameters.values(), strict=True):
            if parameter.grad is None:  # nothing of what is compared depends on it
                continue
            gradient = parameter.grad.to(master.dtype) / self.scale
            sound &= gradient.isfinite().all()
            parameter.grad = None
            master.grad = gradient
        return bool(sound)

    def _batch(self) -> Call:
        call = self.batches.at(self.step)
        if self.options.augment is None:
            return call
        changed = self.options.augment(call, step_generator(self.options.seed, -1 - self.step))
        if not isinstance(changed, Call):
            raise OptionError(
                f"Refine(augment={callable_name(self.options.augment)}) returned a {type(changed).__name__}; it must "
                "return a Call, such as the one it is given, changed by call.map(...)"
            )
        return changed

    def _optimizer(self) -> tuple[torch.optim.Optimizer, LRScheduler]:
        groups = [
            {"params": [master], "lr": self.options.lr * _size(name, master)}
            for name, master in zip(self.parameters, self.masters, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.options.weight_decay)
        if self.options.schedule == "cosine":
            return optimizer, CosineAnnealingLR(optimizer, self.options.steps)
        peaks = [float(group["lr"]) for group in optimizer.param_groups]
        return optimizer, OneCycleLR(optimizer, peaks, self.options.steps, cycle_momentum=False)

    # ---- the checkpoint ------------------------------------------------------------------------------------------

    def _source(self, inputs: Sequence[Call]) -> dict[str, Any]:
        """What a run depends on; one that is resumed has to agree on all of it."""
        return {
            "options": self.options.to_json(),
            "loss": _loss_name(self.judge),
            "parameters": {name: sha256_tensor(tensor) for name, tensor in self.factored.module.named_parameters()},
            "inputs": [call_checksum(call) for call in inputs],
            "select": [call_checksum(batch.call) for batch in self.select],
        }

    def _write(self) -> None:
        assert self.folder is not None
        started = time.monotonic()
        optimizer = self.optimizer.state_dict()
        tensors = {f"kept.{number}": tensor for number, tensor in enumerate(self.kept)}
        tensors.update((f"master.{number}", tensor) for number, tensor in enumerate(self.masters))
        for number, state in optimizer["state"].items():
            tensors.update((f"moment.{number}.{key}", tensor) for key, tensor in state.items())
        data = {
            "source": self.source,
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "schedule": self.schedule.state_dict(),
            "progress": {name: getattr(self, name) for name in _PROGRESS},
        }
        write_bundle(self.folder, NAME, FORMAT, data, tensors)
        ended = time.monotonic()
        self.due = ended + max(CHECKPOINT_SECONDS, (ended - started) / CHECKPOINT_SHARE)

    def _restore(self, data: dict[str, Any], tensors: dict[str, Tensor]) -> str | None:
        """Take over a state; where it is of another run nothing, and what first differs is said."""
        for name, mine in self.source.items():
            if data["source"][name] != mine:
                return name
        with torch.no_grad():
            for number, (master, parameter) in enumerate(zip(self.masters, self.parameters.values(), strict=True)):
                self.kept[number].copy_(tensors[f"kept.{number}"])
                master.copy_(tensors[f"master.{number}"])
                if master is not parameter:
                    parameter.copy_(master)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("moment."):
                _, place, moment = key.split(".", 2)
                # A copy, because results may depend on how the memory is aligned, and in the file it is not.
                moments.setdefault(int(place), {})[moment] = tensor.clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.schedule.load_state_dict(data["schedule"])
        for group, rate in zip(self.optimizer.param_groups, data["rates"], strict=True):
            group["lr"] = float(rate)
        for name in _PROGRESS:
            setattr(self, name, data["progress"][name])
        self.history = [(int(step), float(loss), float(error)) for step, loss, error in self.history]
        return None


_PROGRESS = ("step", "losses", "history", "notes", "start", "best", "best_step", "done", "scale", "before")
"""Attributes of a run that are numbers, lists of numbers, or text."""


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _loss_name(judge: Judge | None) -> str | None:
    """What errors are measured by, with the place of a function of the user's; None for the L2 distance."""
    if judge is None:
        return None
    return callable_name(judge.measure.fn) if isinstance(judge.measure, LossMeasure) else judge.measure.name


def _master(parameter: nn.Parameter) -> Tensor:
    """What the optimizer changes: the parameter, or a float32 copy where it is narrower."""
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return parameter.detach().float()


def _size(name: str, parameter: Tensor) -> float:
    """The scale of a parameter, by which its step size is multiplied: its root mean square.

    A bias or a norm's parameter may be zero and still has to move: it counts for ``LEAST_SIZE`` at least.
    """
    size = float(parameter.detach().double().square().mean().sqrt())
    if is_factor(name):
        return size or LEAST_SIZE
    return max(size, LEAST_SIZE)
