"""A model taken as its tree of modules: the way for models that ``torch.export`` refuses.

The model's own ``forward`` runs, with all its Python; forward pre-hooks observe the layers, and factored modules stand
in for them. Layers that no module's ``forward`` applies (weights read by other code) are out of reach here.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from lowrank_fx._ambient import seeded
from lowrank_fx._memory import distinct_numbers
from lowrank_fx.attention_parts import Parts, adopt, close_attentions, named_parts, open_attentions, watched
from lowrank_fx.batches import Call
from lowrank_fx.capture import device_of, plain_attention, unwrap
from lowrank_fx.errors import CaptureError
from lowrank_fx.forms import Factors
from lowrank_fx.graph_program import flop_counter
from lowrank_fx.hooks import user_hooks
from lowrank_fx.modules import (
    Layer,
    dense,
    is_computed,
    is_stand_in,
    read_layer,
    settled,
    stand_in,
    swap,
)
from lowrank_fx.program import Factored, Outputs, Program, Trials, flat
from lowrank_fx.refusal import quiet
from lowrank_fx.rewrite import own_tensors
from lowrank_fx.sites import Site, SiteTable, Tap
from lowrank_fx.tree_sites import find_sites

Hooks: TypeAlias = Mapping[str, Mapping[str, Mapping[int, Any]]]
"""By module name and attribute: every hook in its order, None where it belongs to the model and stays in its place."""


class TreeProgram(Program):
    """A module tree.

    Args:
        module: a copy of the user's tree that shares its parameters, in eval mode, without the user's hooks.
        hooks: the user's hooks; factored programs get them back.
        cleanup: what was folded before sites were found.
        notes: what the user should know.
    """

    way = "modules"

    def __init__(
        self, module: nn.Module, hooks: Hooks, cleanup: tuple[str, ...] = (), notes: tuple[str, ...] = ()
    ) -> None:
        self.module = module
        self.hooks = hooks
        self.cleanup = cleanup
        self.notes = notes

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        notes: tuple[str, ...] = (),
        *,
        example: Call | None = None,
        known: Collection[str] = (),
    ) -> TreeProgram:
        """Take a model as its module tree; the model stays as it is.

        Args:
            model: the model.
            notes: what the user should know.
            example: a call that shows how attentions are called, so that they can be opened; without it they stay
                closed, except those that ``known`` tells of.
            known: names of weights that were found when the same model was taken before.

        Raises:
            CaptureError: the model cannot be copied, or has no modules because it was exported.
        """
        if isinstance(model, GraphModule) and not any(isinstance(read_layer(each), Layer) for each in model.modules()):
            raise CaptureError(
                f"{type(model).__name__} is a graph of operators and has no module tree; pass capture='export'"
            )
        tree, cleanup = _settle(_share(model))
        hooks: dict[str, dict[str, dict[int, Any]]] = {}
        for entry in list(user_hooks(tree)):
            kept = {key: None if key in entry.own else hook for key, hook in entry.hooks.items()}
            hooks.setdefault(entry.name, {})[entry.attribute] = kept
            entry.module.__dict__[entry.attribute] = entry.own
        for module in tree.modules():
            module.training = False  # eval() of an exported graph raises
        parts = named_parts(tree, known)
        if example is not None and any(isinstance(module, nn.MultiheadAttention) for module in tree.modules()):
            parts = _called(tree, example)
        cleanup = (*cleanup, *open_attentions(tree, parts))
        return cls(tree, hooks, cleanup, notes)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Any call is the model's own to judge."""
        return args, kwargs

    def run(self, call: Call) -> Outputs:
        """Run the model's own forward."""
        return _run(self.module, call)

    def returned(self, call: Call) -> Any:
        """Run the model's own forward."""
        return _returned(self.module, call)

    def find_sites(self, skip: Sequence[str] = ()) -> SiteTable:
        """Sites by the class of the modules, in the order of the tree."""
        return find_sites(self.module, skip)

    def weight(self, site: Site) -> Tensor:
        """The weight of a site's first module, computed where it is parametrised."""
        weight = self.module.get_submodule(site.calls[0].node).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def params(self) -> int:
        """Numbers in all parameters of the model."""
        return distinct_numbers(self.module.parameters())

    def observed(self, table: SiteTable, observers: Mapping[str, nn.Module]) -> Callable[[Call], Outputs]:
        """The model with a forward pre-hook on every layer that is a site."""

        def run(call: Call) -> Outputs:
            with contextlib.ExitStack() as stack:
                for tap in table.taps.values():
                    hook = _observing(observers[tap.name], tap)
                    handle = self.module.get_submodule(tap.node).register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
                return self.run(call)

        return run

    def count_flops(self, call: Call) -> int:
        """FLOPs of a real run; the model's Python may look at values."""
        counter = flop_counter()
        with counter, torch.no_grad():
            self.run(call)
        return int(counter.get_total_flops())

    def trials(self, call: Call, sites: Sequence[Site], base: Factored | None = None) -> Trials:
        """One whole run per trial: nothing is known of what runs behind a layer."""
        for site in sites:

            def trial(factors: Factors | None, site: Site = site) -> Outputs:
                changed = {name: own for name, own in (base or {}).items() if name != site.name}
                if factors is not None:
                    changed[site.name] = (site, factors)
                return self.exchanged(changed)(call)

            yield site, trial

    def exchanged(self, factored: Factored) -> Callable[[Call], Outputs]:
        """The model with stand-ins in its tree while it runs."""

        def run(call: Call) -> Outputs:
            originals: dict[str, nn.Module] = {}
            root = self.module
            try:
                for name, module in _stand_ins(self.module, factored, trainable=False).items():
                    originals[name] = self.module.get_submodule(name)
                    root = swap(root, name, module)
                return _run(root, call)
            finally:
                for name, original in originals.items():
                    swap(self.module, name, original)

        return run

    def probed(self, nodes: Sequence[str]) -> Callable[[Call], tuple[Outputs, dict[str, Tensor]]]:
        """The model with a forward hook on some of its layers."""

        def run(call: Call) -> tuple[Outputs, dict[str, Tensor]]:
            values: dict[str, Tensor] = {}
            with contextlib.ExitStack() as stack:
                for name in nodes:

                    def keep(module: nn.Module, args: object, output: Any, name: str = name) -> Any:
                        if not isinstance(output, Tensor):
                            return None
                        values[name] = output
                        return output.clone()  # the model may write to it

                    stack.callback(self.module.get_submodule(name).register_forward_hook(keep).remove)
                return self.run(call), values

        return run

    def factorize(self, factored: Factored, *, clone: bool) -> TreeProgram:
        """A copy of the tree with stand-ins, and the user's hooks back in place."""
        tree = _share(self.module)
        for name, module in _stand_ins(tree, factored, trainable=True).items():
            tree = swap(tree, name, module)
        adopt(tree)
        if not factored:
            close_attentions(tree)
        if clone:
            own_tensors(tree)
        for name, hooks in self.hooks.items():
            module = tree.get_submodule(name)
            for attribute, own in hooks.items():
                current = getattr(module, attribute)
                merged = {key: current.get(key) if hook is None else hook for key, hook in own.items()}
                module.__dict__[attribute] = OrderedDict({**merged, **current})
        return self._with(tree)

    def unfoldable(self, sites: Mapping[str, Site]) -> dict[str, str]:
        """Sites without stand-ins; the middle value of a stand-in is its own."""
        return {
            name: "the module tree has no pair of this name"
            for name, site in sites.items()
            if not all(is_stand_in(self.module.get_submodule(call.node)) for call in site.calls)
        }

    def fold(self, sites: Mapping[str, Site]) -> TreeProgram:
        """A copy of the tree with plain layers in the places of these sites' stand-ins."""
        tree = _share(self.module)
        wanted = {id(tree.get_submodule(call.node)) for site in sites.values() for call in site.calls}
        folded: dict[int, nn.Module] = {}
        for name, module in list(tree.named_modules(remove_duplicate=False)):
            if id(module) in wanted and is_stand_in(module):
                tree = swap(tree, name, folded.setdefault(id(module), dense(module)))
        for site in sites.values():  # what shared a weight shares it again
            first = tree.get_submodule(site.calls[0].node)
            for call in site.calls[1:]:
                tree.get_submodule(call.node)._parameters["weight"] = first._parameters["weight"]
        adopt(tree)
        close_attentions(tree)
        own_tensors(tree)
        return self._with(tree)

    def copy(self) -> TreeProgram:
        """A copy that owns its tensors."""
        tree = _share(self.module)
        own_tensors(tree)
        return self._with(tree)

    def train(self, mode: bool) -> None:
        """Set the model's own flags: dropout and batch norms obey."""
        try:
            self.module.train(mode)
        except NotImplementedError:  # an exported graph's train() and eval() raise
            for module in self.module.modules():
                module.training = mode

    def moved(self, before: torch.device, after: torch.device) -> None:
        """Nothing to do: the model's own Python finds its devices."""

    def _with(self, tree: nn.Module) -> TreeProgram:
        return TreeProgram(tree, self.hooks, self.cleanup, self.notes)


def _run(module: nn.Module, call: Call) -> Outputs:
    return flat(_returned(module, call))


def _returned(module: nn.Module, call: Call) -> Any:
    call = call.map(torch.clone)
    with plain_attention():  # the fused kernel passes hooks by, and no one counts its FLOPs
        return module(*call.args, **call.kwargs)


def _called(tree: nn.Module, example: Call) -> dict[str, Parts]:
    """How the attentions of a tree are called, learnt from a run of a copy of it."""
    probe = _share(tree)
    # A call that fails here fails in calibration too, where the message names the batch.
    with watched(probe) as parts, contextlib.suppress(Exception), torch.no_grad(), seeded(device_of(tree)), quiet():
        _run(probe, example)
    return parts


def _share(model: nn.Module) -> nn.Module:
    """A copy of a module tree whose parameters are the model's own; buffers and everything else are copied.

    Modules that were compiled are plain ones in the copy.
    """
    memo: dict[int, Any] = {}
    modules = list(model.modules())
    for module in modules:
        memo.update((id(value), value) for value in module._parameters.values() if value is not None)
        for value in pytree.tree_leaves(list(vars(module).values())):
            if isinstance(value, Tensor) and not value.is_leaf:  # which deepcopy refuses
                memo[id(value)] = value.detach().clone()
    for entry in user_hooks(model):
        # A hook may be a method of something that must not be copied, such as a logger.
        memo.update((id(hook), hook) for key, hook in entry.hooks.items() if key not in entry.own)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in reversed(modules):  # the innermost first
                if unwrap(module) is not module:
                    memo[id(module)] = copy.deepcopy(unwrap(module), memo)
            return copy.deepcopy(unwrap(model), memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be taken as a module tree, because it cannot be copied: "
            f"{type(error).__name__}: {error}; give the object that refuses a __deepcopy__, or keep it out of the model"
        ) from error


def _settle(tree: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Layers whose weights are computed become plain ones, as in a graph; the tree, and a line for each."""
    changes: list[str] = []
    plain: dict[int, nn.Module] = {}
    for name, module in list(tree.named_modules(remove_duplicate=False)):
        if not isinstance(read_layer(module), Layer) or not is_computed(module):
            continue
        if id(module) not in plain:
            plain[id(module)] = settled(module)
            changes.append(f"{name or type(module).__name__}: a weight that is computed from parameters became one")
        tree = swap(tree, name, plain[id(module)])
    return tree, tuple(changes)


def _stand_ins(tree: nn.Module, factored: Factored, *, trainable: bool) -> dict[str, nn.Module]:
    """The stand-ins for every module of the given sites, by module name."""
    made: dict[str, nn.Module] = {}
    names_of: dict[int, list[str]] = {}
    for name, module in tree.named_modules(remove_duplicate=False):
        names_of.setdefault(id(module), []).append(name)
    for site, factors in factored.values():
        first = tree.get_submodule(site.calls[0].node)
        weight = first.weight
        assert isinstance(weight, nn.Parameter)
        wanted = trainable and weight.requires_grad
        parameters: dict[str, Any] = {
            leaf: nn.Parameter(tensor.detach(), requires_grad=wanted) for leaf, tensor in factors.tensors.items()
        }
        shared = replace(factors, **parameters)
        for call in site.calls:
            module = tree.get_submodule(call.node)
            bias: Any = module.bias
            if bias is not None and factors.shift is not None:
                moved = (bias.detach().double() + factors.shift.to(bias.device)).to(bias.dtype)
                bias = nn.Parameter(moved, requires_grad=trainable and bias.requires_grad)
            replacement = stand_in(module, site, shared, bias)
            for name in names_of[id(module)]:
                made[name] = replacement
    return made


def _observing(observer: nn.Module, tap: Tap) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        activation = args[0] if args else next(iter(kwargs.values()))
        if activation.is_nested:  # rows of differing lengths have no patches and no common mask
            return
        if tap.patch is not None and activation.dim() == len(tap.patch.kernel) + 1:
            activation = activation.unsqueeze(0)
        observer(activation)

    return hook
