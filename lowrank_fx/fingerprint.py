"""Checksums that tell whether a model, or a batch, is the one that something was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lowrank_fx._files import sha256_tensor
from lowrank_fx.batches import Call
from lowrank_fx.program import Way


@dataclass(frozen=True)
class BaseWeight:
    """One tensor of the model that a plan or a calibration was made for."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


def base_weights(model: nn.Module) -> dict[str, BaseWeight]:
    """Shape, dtype and checksum of every tensor in the model's state dict."""
    return {
        name: BaseWeight(tuple(tensor.shape), str(tensor.dtype), sha256_tensor(tensor))
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    }


def weights_differ(stored: Mapping[str, BaseWeight], actual: Mapping[str, BaseWeight]) -> str | None:
    """What is first found to differ between the stored weights and the actual ones, in words; None if nothing does."""
    for name in [*stored, *(name for name in actual if name not in stored)]:
        if name not in actual:
            return f"it was made for a model with a tensor {name!r}, which this one does not have"
        if name not in stored:
            return f"it was made for a model without a tensor {name!r}"
        want, have = stored[name], actual[name]
        if (want.shape, want.dtype) != (have.shape, have.dtype):
            return f"its {name!r} is {want.shape} {want.dtype}, not {have.shape} {have.dtype}"
        if want.sha256 != have.sha256:
            return f"its {name!r} has other values"
    return None


Share: TypeAlias = tuple[int, int, int | None]
"""Of a tap: the length of a row, the number of groups, and the size of the sketch (None if exact)."""


@dataclass(frozen=True)
class Source:
    """What a calibration is made of; a run that resumes it and shards that are merged have to agree on all of it.

    Attributes:
        weights: the tensors of the user's model.
        way: how the model was captured.
        taps: width, groups and sketch size by tap name.
        seed: chooses the rows.
        holdout: share of the batches that is held out.
        first_batch: checksum of the loader's first batch.
        shards: into how many shards the batches are divided; 1 for a single run.
        keeps_batches: whether the loader's own batches are kept beside the arguments of ``forward``, for a loss.
    """

    weights: Mapping[str, BaseWeight]
    way: Way
    taps: Mapping[str, Share]
    seed: int
    holdout: float
    first_batch: str
    shards: int
    keeps_batches: bool = False

    def differs(self, other: Source) -> str | None:
        """What is first found to differ from ``other``, in words that begin with "it"; None if nothing does."""
        weights = weights_differ(self.weights, other.weights)
        if weights is not None:
            return weights
        for name in ("way", "seed", "holdout", "shards"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                label = {"way": "capture", "shards": "number of shards"}.get(name, name)
                return f"its {label} is {mine!r}, not {theirs!r}"
        for name in [*other.taps, *(name for name in self.taps if name not in other.taps)]:
            if name not in self.taps or name not in other.taps:
                return f"it {'has a' if name in self.taps else 'lacks the'} sketch of {name!r} (skip= may differ)"
            mine, theirs = self.taps[name], other.taps[name]
            if mine != theirs:
                return f"its sketch of {name!r} has {describe_share(mine)}, not {describe_share(theirs)}"
        if self.keeps_batches != other.keeps_batches:
            kept = "keeps the loader's batches" if self.keeps_batches else "does not keep the loader's batches"
            return f"it {kept} for a loss (loss_fn= differs)"
        if self.first_batch != other.first_batch:
            return "its first batch is another one; the loader has to give the same batches in the same order"
        return None

    def packed(self) -> dict[str, Any]:
        """The source as JSON data."""
        return {
            "weights": {name: asdict(entry) for name, entry in self.weights.items()},
            "capture": self.way,
            "taps": [[name, *share] for name, share in self.taps.items()],
            "seed": self.seed,
            "holdout": self.holdout,
            "first_batch": self.first_batch,
            "shards": self.shards,
            "keeps_batches": self.keeps_batches,
        }

    @classmethod
    def unpacked(cls, data: Mapping[str, Any]) -> Source:
        """The source that :meth:`packed` made ``data`` of.

        Raises:
            ValueError: the data is malformed (or another error of malformed data).
        """
        if data["capture"] not in get_args(Way):
            raise ValueError(f"capture is {data['capture']!r}")
        return cls(
            weights={
                str(name): BaseWeight(tuple(entry["shape"]), str(entry["dtype"]), str(entry["sha256"]))
                for name, entry in data["weights"].items()
            },
            way=data["capture"],
            taps={
                str(name): (int(width), int(groups), None if size is None else int(size))
                for name, width, groups, size in data["taps"]
            },
            seed=int(data["seed"]),
            holdout=float(data["holdout"]),
            first_batch=str(data["first_batch"]),
            shards=int(data["shards"]),
            keeps_batches=bool(data["keeps_batches"]),
        )


def describe_share(share: Share) -> str:
    """A tap's share in words."""
    width, groups, size = share
    kept = "all their second moments" if size is None else f"{size} rows"
    return f"{kept} for rows of {width} numbers in {groups} groups"


def call_checksum(call: Call) -> str:
    """A checksum of the shapes and dtypes of all tensors of a call, and of the values in their first rows.

    A batch of other rows almost surely has another first row, and hashing all of an image batch would take as long as
    a small model does. Tensors without plain data (nested, sparse, quantised) count by their type alone.
    """
    digest = hashlib.sha256()
    for tensor in call.tensors():
        if tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized):
            digest.update(f"{list(tensor.shape)}{sha256_tensor(tensor[:1] if tensor.dim() else tensor)}".encode())
        else:
            digest.update(f"{tensor.layout}{tensor.dtype}".encode())
    return digest.hexdigest()
