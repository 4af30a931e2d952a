"""The order in which passes run: one visible tuple per stage, and why.

A stage is run by a :class:`~lowrank_fx.passes.base.PassManager`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lowrank_fx.forms import Factors
from lowrank_fx.passes.base import Pass
from lowrank_fx.passes.factorize_bmm import FactorizeBmm
from lowrank_fx.passes.factorize_conv import FactorizeConv
from lowrank_fx.passes.factorize_linear import FactorizeLinear
from lowrank_fx.passes.factorize_regauged import FactorizeRegauged
from lowrank_fx.passes.fold_batchnorm import FoldBatchNorm
from lowrank_fx.passes.fold_constants import FoldConstants
from lowrank_fx.passes.fold_factors import FoldFactors
from lowrank_fx.passes.lower_einsum import LowerEinsum
from lowrank_fx.passes.merge_adapters import MergeAdapters
from lowrank_fx.passes.merge_pairs import MergePairs
from lowrank_fx.passes.observe_taps import ObserveTaps
from lowrank_fx.passes.pack_shared_input import PackSharedInput
from lowrank_fx.passes.restore_pairs import MergedPair, RestorePairs
from lowrank_fx.passes.untie_embeddings import UntieEmbeddings
from lowrank_fx.sites import Site, Tap


def cleanup() -> tuple[Pass, ...]:
    """What makes the captured graph plain, before sites are found."""
    return (
        FoldConstants(),  # first: a weight-normalised convolution is a parameter only after it
        LowerEinsum(),  # after constants: the part of a packed weight that an einsum reads is a parameter only then
        UntieEmbeddings(),  # after einsums: a head written as one is seen as a linear layer only then
        MergeAdapters(),  # before batch norms: behind a sum they cannot be folded, behind a convolution they can
        FoldBatchNorm(),  # before sites are found: the folded weight is the one to factor
    )


def pairing(found: dict[str, MergedPair]) -> tuple[Pass, ...]:
    """What takes factored pairs as one layer each, once the graph is plain; ``found`` takes up what to put back."""
    return (MergePairs(found),)


def pair_folding() -> tuple[Pass, ...]:
    """What makes the factored pairs of a captured graph dense; everything else stays as it was captured."""
    return (
        FoldConstants(),  # first: what is computed from parameters is a weight only after it
        MergeAdapters(),  # before pairs: an adapter is one too, and would be merged without the layer beside it
        MergePairs(),
    )


def observation(taps: Mapping[str, Tap], observers: Mapping[str, nn.Module]) -> tuple[Pass, ...]:
    """What turns the clean graph into one that sketches while it runs."""
    return (ObserveTaps(taps, observers),)


def rewriting(factored: Mapping[str, tuple[Site, Factors]], pairs: Sequence[MergedPair] = ()) -> tuple[Pass, ...]:
    """What puts factored pairs in place; those from linear to batched touch different nodes, so their order is free."""
    return (
        RestorePairs(pairs),  # first: its nodes take back the names that they had
        FactorizeLinear(factored),
        FactorizeRegauged(factored),
        FactorizeConv(factored),
        FactorizeBmm(factored),
        PackSharedInput(factored),  # last: the pairs of linear layers are there then
    )


def folding(sites: Mapping[str, Site]) -> tuple[Pass, ...]:
    """What makes the factored graph dense again."""
    return (FoldFactors(sites),)
