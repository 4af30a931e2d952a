"""An ONNX model as a :class:`~lowrank_fx.program.Program`: the way for models whose PyTorch source is gone.

onnxruntime runs it, on the CPU; torch sketches, plans and factors. Output gradients come from ``derivatives.py``, where
it knows all operators; no correction walks the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn

from lowrank_fx.batches import Call
from lowrank_fx.errors import CalibrationError, PlanError
from lowrank_fx.forms import Factors
from lowrank_fx.onnx_frontend import rewrite
from lowrank_fx.onnx_frontend.derivatives import Derivatives
from lowrank_fx.onnx_frontend.flops import count_flops
from lowrank_fx.onnx_frontend.inputs import named
from lowrank_fx.onnx_frontend.model import OnnxModel, describe_node
from lowrank_fx.onnx_frontend.runtime import Runner, cut_activation, cut_output
from lowrank_fx.onnx_frontend.sites import find_sites
from lowrank_fx.program import Factored, Outputs, Program, Trials, flat
from lowrank_fx.sites import Site, SiteTable


class OnnxModule(nn.Module):
    """A program as something to call; its weights are in the ONNX model, so it has no parameters.

    Args:
        run: from inputs by name to outputs by name.
    """

    def __init__(self, run: Callable[[Mapping[str, Tensor]], Mapping[str, Any]]) -> None:
        super().__init__()
        self._call = run
        self.eval()

    def forward(self, **inputs: Tensor) -> Any:
        """The output of the model; by name where there are several."""
        outputs = self._call(inputs)
        return next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)


@dataclass(frozen=True)
class _Origin:
    """What a factored program was made of."""

    model: OnnxModel
    factored: Factored


class OnnxProgram(Program):
    """An ONNX model.

    Args:
        model: the model.
        notes: what the user should know.
        origin: what it was made of, where it was factored.
    """

    way = "onnx"

    def __init__(self, model: OnnxModel, notes: tuple[str, ...] = (), origin: _Origin | None = None) -> None:
        self.model = model
        self.cleanup = ()
        self.notes = notes
        self.module = OnnxModule(lambda inputs: self._runner.run(inputs))
        self._origin = origin

    @cached_property
    def _runner(self) -> Runner:
        """Serves runs and trials alike, so that they differ by their weights alone."""
        if self._origin is not None:
            return Runner(self.model)
        table = self.find_sites()
        return Runner(self.model, [name for site in table.sites for name in (site.weight, *site.biases)])

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call by the names of the inputs.

        Raises:
            CallError: it does not fit.
        """
        return (), named(self.model, args, kwargs)

    def run(self, call: Call) -> Outputs:
        """Run the session."""
        return self._run(call, {})

    def returned(self, call: Call) -> Any:
        """The output, or a dictionary where there are several."""
        return self.module(**call.kwargs)

    def find_sites(self, skip: Sequence[str] = ()) -> SiteTable:
        """Sites by the table of ONNX operators."""
        return find_sites(self.model, skip)

    def weight(self, site: Site) -> Tensor:
        """The weight of a site."""
        return self.model.tensor(site.weight)

    def params(self) -> int:
        """Numbers in all floating constants."""
        return self.model.count_params()

    def observed(self, table: SiteTable, observers: Mapping[str, nn.Module]) -> Callable[[Call], Outputs]:
        """A session of its own, in which every tap's activation is an output too."""
        nodes = list(dict.fromkeys(tap.node for tap in table.taps.values()))
        runner = Runner(self.model, watched=nodes)

        def run(call: Call) -> Outputs:
            outputs, values, rows = runner.run_filled(call.kwargs, watched=nodes)
            for tap in table.taps.values():
                try:
                    observers[tap.name](cut_activation(values[tap.node], rows, tap.groups))
                except CalibrationError as error:
                    reader = describe_node(self.model.producers[tap.reader])
                    raise CalibrationError(f"{error} (the {reader} reads it as {tap.node!r})") from error
            return flat([cut_output(value, rows) for value in outputs.values()])

        return run

    def count_flops(self, call: Call) -> int:
        """FLOPs of a real run's shapes."""
        return count_flops(self.model, call.kwargs)

    def trials(self, call: Call, sites: Sequence[Site], base: Factored | None = None) -> Trials:
        """One whole run per trial: a session gives no way to start behind a site."""
        kept = {name: rewrite.substitutes(self.model, *own, exact=False) for name, own in (base or {}).items()}
        for site in sites:

            def trial(factors: Factors | None, site: Site = site) -> Outputs:
                values = {key: value for name, own in kept.items() if name != site.name for key, value in own.items()}
                if factors is not None:
                    values.update(rewrite.substitutes(self.model, site, factors, exact=False))
                return self._run(call, values)

            yield site, trial

    def exchanged(self, factored: Factored) -> Callable[[Call], Outputs]:
        """The session with the dense products of the factors in the place of weights."""
        values: dict[str, Tensor] = {}
        for site, factors in factored.values():
            values.update(rewrite.substitutes(self.model, site, factors, exact=False))
        return lambda call: self._run(call, values)

    def probed(self, nodes: Sequence[str]) -> Callable[[Call], tuple[Outputs, dict[str, Tensor]]]:
        """A session of its own; where gradients are recorded, torch evaluates what lies behind the nodes once more.

        What is returned then raises RuntimeError for a model that has no derivative. The values at the nodes keep rows
        that fill up a fixed batch: the graph may fix their number too. Outputs are cut, and do not depend on them.
        """
        behind = Derivatives(self.model, nodes)
        watched = list(dict.fromkeys((*nodes, *behind.watched)))
        runner = Runner(self.model, watched=watched)

        def run(call: Call) -> tuple[Outputs, dict[str, Tensor]]:
            outputs, values, rows = runner.run_filled(call.kwargs, watched=watched)
            found = {name: values[name] for name in nodes}
            if torch.is_grad_enabled():
                outputs, found = behind.evaluate(values, outputs)
            return flat([cut_output(value, rows) for value in outputs.values()]), found

        return run

    def factorize(self, factored: Factored, *, clone: bool) -> OnnxProgram:
        """A program of the rewritten model; messages are copied whatever ``clone`` says."""
        if self._origin is not None:
            raise PlanError("this program is factored already; factor the one that it was made of")
        return OnnxProgram(rewrite.factorized(self.model, factored), self.notes, _Origin(self.model, dict(factored)))

    def unfoldable(self, sites: Mapping[str, Site]) -> dict[str, str]:
        """None: what was factored is known, so the dense weight is too."""
        return {}

    def without_derivative(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """The operators behind some sites that have no derivative here; empty where gradients can be taken."""
        return Derivatives(self.model, [call.node for site in sites for call in site.calls]).missing

    def fold(self, sites: Mapping[str, Site]) -> OnnxProgram:
        """The original's graph with the products of the factors for weights; sites that are not given stay factored."""
        if self._origin is None:
            return self.copy()
        source, factored = self._origin.model, self._origin.factored
        values: dict[str, Tensor] = {}
        for name in sites:
            values.update(rewrite.substitutes(source, *factored[name]))
        kept = {name: own for name, own in factored.items() if name not in sites}
        folded = rewrite.with_values(source, values)
        return OnnxProgram(folded, self.notes).factorize(kept, clone=True) if kept else OnnxProgram(folded, self.notes)

    def copy(self) -> OnnxProgram:
        """A program of a copy of the model."""
        proto = ModelProto()
        proto.CopyFrom(self.model.proto)
        return OnnxProgram(OnnxModel(proto, self.model.external), self.notes, self._origin)

    def train(self, mode: bool) -> None:
        """The module's flag alone: a session computes what the file says."""
        self.module.training = mode

    def moved(self, before: Any, after: Any) -> None:
        """Nothing to do: it stays on the CPU."""

    def _run(self, call: Call, values: Mapping[str, Tensor]) -> Outputs:
        return flat(list(self._runner.run(call.kwargs, values).values()))
