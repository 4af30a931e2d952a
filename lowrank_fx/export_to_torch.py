"""EXPORT: torch's own formats: an exported program, an AOTInductor package, and TorchScript while torch has it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from lowrank_fx import rewrite
from lowrank_fx.errors import ExportError
from lowrank_fx.export_inputs import plain
from lowrank_fx.export_program import Subject, first_line
from lowrank_fx.refusal import quiet

PLAN_ENTRY = "plan.json"
"""The plan's name among a file's extra files."""

Ran = list[list[Tensor]]
"""The tensors among the outputs, per run."""


def write_pt2(program: ExportedProgram, path: Path, plan: str) -> None:
    """Write an exported program with the plan beside it, and none of the inputs that it was made with."""
    program.example_inputs = None  # they may be the user's data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path, extra_files={PLAN_ENTRY: plan})


def run_pt2(path: Path, subject: Subject, calls: Sequence[Sequence[Tensor]]) -> Ran:
    """What a file that :func:`write_pt2` wrote computes."""
    with _refusing("torch.export.load"):
        module = torch.export.load(path).module()
        return _run(module, subject, calls)


def write_aoti(program: ExportedProgram, path: Path, plan: str) -> None:
    """Compile an exported program into a package of machine code for this processor; it needs a C++ compiler.

    Raises:
        ExportError: there is no compiler, or it fails.
    """
    from torch._inductor import aoti_compile_and_package

    options = {"aot_inductor.metadata": {PLAN_ENTRY: plan}}
    try:
        with quiet(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except Exception as error:  # of inductor, of the compiler, of the linker
        raise ExportError(
            f"AOTInductor cannot compile the model here: {first_line(error)}; it needs a C++ compiler that torch can "
            "call. export_pt2 writes a file that needs none"
        ) from error


def run_aoti(path: Path, subject: Subject, calls: Sequence[Sequence[Tensor]]) -> Ran:
    """What a package that :func:`write_aoti` wrote computes."""
    from torch._inductor import aoti_load_package

    with _refusing("AOTInductor's loader"):
        return _run(aoti_load_package(str(path)), subject, calls)


def write_torchscript(subject: Subject, names: Sequence[str], path: Path, plan: str) -> None:
    """Write a graph as TorchScript, with the plan beside it.

    It takes the tensors among the inputs by position, and returns the tensors among the outputs: one by itself,
    those of a dictionary (or of a class with named fields) as a flat dictionary, others as a tuple.

    Args:
        subject: what is written.
        names: of every leaf of the output.
        path: where.
        plan: as JSON.

    Raises:
        ExportError: torch has no TorchScript any more, or it does not take the graph.
    """
    if not hasattr(torch.jit, "script"):
        raise ExportError(f"torch {torch.__version__} has no TorchScript any more; export_pt2 writes what replaced it")
    with _refusing("TorchScript"), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted: Any = torch.jit.script(_scriptable(subject, names))
        torch.jit.save(scripted, path, _extra_files={PLAN_ENTRY: plan.encode()})


def run_torchscript(path: Path, calls: Sequence[Sequence[Tensor]]) -> Ran:
    """What a file that :func:`write_torchscript` wrote computes."""
    with _refusing("TorchScript"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: Any = torch.jit.load(path)  # type: ignore[no-untyped-call]
        return [list(pytree.tree_leaves(module(*tensors))) for tensors in calls]


def _scriptable(subject: Subject, names: Sequence[str]) -> GraphModule:
    """A copy of the graph in the words that TorchScript knows: no pytrees, no overloads, sizes by ``Tensor.size``.

    Scripting reads the graph's code, so that sizes stay sizes; tracing would write down those of the example.
    """
    module = rewrite.copy_graph_module(subject.module, clone=False)
    graph = module.graph
    returned = plain(subject.call(subject.tensors))
    graph.set_codegen(CodeGen())
    for node, leaf in zip(graph.find_nodes(op="placeholder"), subject.leaves, strict=True):
        if not isinstance(leaf, Tensor):
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.sym_size.int:
            with graph.inserting_before(node):
                size = graph.call_method("size", node.args)
            node.replace_all_uses_with(size)
            graph.erase_node(node)
        elif isinstance(node.target, OpOverload):
            node.target = node.target.overloadpacket
    output = graph.output_node()
    values = pytree.tree_leaves(output.args[0])
    tensors = {name: value for name, value in zip(names, values, strict=True) if isinstance(value, Node)}
    made: Any = tuple(tensors.values())
    if isinstance(returned, dict):
        made = tensors
    elif isinstance(returned, Tensor):
        (made,) = tensors.values()
    output.args = (made,)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _run(module: Callable[..., Any], subject: Subject, calls: Sequence[Sequence[Tensor]]) -> Ran:
    ran = []
    for tensors in calls:
        args, kwargs = subject.plain_call(tensors)
        with torch.no_grad():
            output = module(*args, **kwargs)
        ran.append([leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)])
    return ran


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except ExportError:
        raise
    except Exception as error:  # each format has its own, from Python and from C++
        raise ExportError(f"{what} does not take the model: {first_line(error)}") from error
