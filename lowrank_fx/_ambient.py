"""Torch's ambient state while the library works: random numbers, autocast, inference mode, gradient mode."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from lowrank_fx.errors import LowRankError


@contextlib.contextmanager
def seeded(device: torch.device, seed: int | None = 0) -> Iterator[None]:
    """Random numbers inside follow from ``seed``; afterwards the global random state is as it was.

    A model that draws random numbers meets the same ones in every run of a batch, so that two versions of it differ
    by their weights alone, and a plan made from such runs can be made again.

    Args:
        device: where the model runs; its generator is seeded besides the CPU's.
        seed: of both; None goes on from the present state.
    """
    accelerated = device.type not in ("cpu", "meta")
    with torch.random.fork_rng([device] if accelerated else [], device_type=device.type if accelerated else "cuda"):
        if seed is not None:
            # torch.manual_seed would also seed accelerators that are not forked here.
            torch.default_generator.manual_seed(seed)
        if seed is not None and accelerated:
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(seed)
        yield


@contextlib.contextmanager
def settled(device: torch.device) -> Iterator[tuple[str, ...]]:
    """Neither autocast nor inference mode nor gradients inside; yields a line about each one that was switched off.

    Autocast would round the sums of a sketch to 16 bits, and parameters made in inference mode could never train.

    Args:
        device: where the model runs; autocast is switched off for it and for the CPU.
    """
    kinds = dict.fromkeys(("cpu", device.type))
    kinds.pop("meta", None)
    notes = tuple(
        f"autocast ({torch.get_autocast_dtype(kind)} on {kind}) was on and was switched off: errors and times are "
        "those of the model without it"
        for kind in kinds
        if torch.is_autocast_enabled(kind)
    )
    if not (notes or torch.is_inference_mode_enabled() or torch.is_grad_enabled()):
        yield notes  # there is nothing to switch off, and calls of a few milliseconds come by here
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield notes
        except LowRankError as error:  # it may be that the model runs with it only
            for note in notes:
                error.add_note(note)
            raise


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Gradient mode, for a model whose author thought of inference.

    Its code may read numbers out of tensors, ``int(x.sum())``, of which torch warns where gradients are recorded.
    """
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar", UserWarning)
        yield
