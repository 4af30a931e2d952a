"""EXPORT: optimized models as files for other runtimes, each checked against the model before it gets its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lowrank_fx import export_to_onnx, export_to_torch
from lowrank_fx._ambient import settled
from lowrank_fx.errors import ExportError, OptionError
from lowrank_fx.export_inputs import dimension_names
from lowrank_fx.export_parity import TOLERANCES, coarsest_dtype, compare_outputs, written
from lowrank_fx.export_program import Subject, check_inputs, exported, input_shapes, subject
from lowrank_fx.session import Session
from lowrank_fx.storage import Artifact


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how it was checked.

    Attributes:
        path: the file.
        kind: ``"onnx"``, ``"pt2"``, ``"aoti"`` or ``"torchscript"``.
        folded: names of the factored layers that are dense operators again.
        opset: of ONNX; None for the others.
        nodes: operators in the file; None where they cannot be counted.
        products: by factored site, how many nodes multiply by each of its weights; empty where they were not counted.
        inputs: names of the tensors that go in.
        outputs: names of what comes out.
        dynamic: the dimensions that may change, by name.
        errors: by output, the largest relative L2 error against the model.
        tolerance: what was allowed.
        source: where the inputs of the check came from.
        batch_sizes: of the check's runs.
        bytes: size of the file, with the weights beside it.
    """

    path: Path
    kind: str
    folded: tuple[str, ...]
    opset: int | None
    nodes: int | None
    products: Mapping[str, tuple[int, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: tuple[str, ...]
    errors: Mapping[str, float]
    tolerance: float
    source: str
    batch_sizes: tuple[int, ...]
    bytes: int

    @property
    def error(self) -> float:
        """The largest of :attr:`errors`."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        """One line: what was written and how it was checked."""
        about = [f"{self.bytes / 1e6:.1f} MB"]
        about += [f"opset {self.opset}"] if self.opset is not None else []
        about += [f"{self.nodes} nodes"] if self.nodes is not None else []
        sizes = " and ".join(map(str, self.batch_sizes))
        return (
            f"{self.path}: {', '.join(about)}; {self.error:.1e} from the model at most (relative L2; batch sizes "
            f"{sizes}; {self.source})"
        )


def export_onnx(
    artifact: Artifact,
    path: str | os.PathLike[str],
    *,
    session: Session | None = None,
    dynamic: bool = True,
    opset: int | None = None,
    external_data: bool | Literal["auto"] = "auto",
    example: Any = None,
    tolerance: float | None = None,
) -> Exported:
    """Write a model as an ONNX file; see :meth:`lowrank_fx.LowRankModule.export_onnx`.

    Args:
        artifact: the model.
        path: the file.
        session: gives held-out inputs for the check; None for a loaded or folded model.
        dynamic: whether the batch, and the sequence, may change as they could when the model was captured; if not,
            every size is fixed to that of ``example``, or of the inputs that the file is checked with.
        opset: of the file; by default the exporter's own.
        external_data: whether weights go to a file of their own; see :func:`lowrank_fx.export_to_onnx.write`.
        example: a batch that the file is checked with.
        tolerance: the relative L2 error that is allowed; by default by the model's dtype, 1e-5 for float32.

    Raises:
        ExportError: the model cannot be converted, the file does not compute what the model does, or a package is
            missing. No file is left then.
        OptionError: ``external_data`` is not legal.
    """
    if external_data not in (True, False, "auto"):
        raise OptionError(f"external_data={external_data!r} is not legal; use True, False or 'auto'")
    export_to_onnx.require_packages()
    with settled(artifact.program.device):
        check = _Check(subject(artifact, session, example), Path(path), tolerance, dynamic=dynamic)
        given, outputs = check.subject, check.outputs
        flat, inputs = given.flat_module(), given.input_names
        # Each input an object of its own: what is given twice would become one input.
        first = tuple(tensor.clone() for tensor in check.inputs[0])
        program = exported(flat, given, first, {}, dynamic=dynamic)
        dimensions = dimension_names(input_shapes(program), inputs)
        model = export_to_onnx.converted(program, inputs, outputs, opset)
        plan = {export_to_onnx.PLAN_KEY: artifact.plan.to_json()}
        export_to_onnx.tidy(model, dimensions, flat, plan)
        with written(check.path) as temporary:
            export_to_onnx.write(model, temporary, external_data)
            found = export_to_onnx.read(temporary)
            products = export_to_onnx.count_products(found, artifact.sites.values(), flat, artifact.folded)
            ran = export_to_onnx.run(temporary, inputs, check.inputs, check.dtype)
            facts = {"opset": found.opset_imports[""], "nodes": len(list(found.graph.all_nodes()))}
            return check.passed("onnx", "onnxruntime", ran, temporary, dimensions, products=products, **facts)


def export_pt2(
    artifact: Artifact,
    path: str | os.PathLike[str],
    *,
    session: Session | None = None,
    example: Any = None,
    tolerance: float | None = None,
    compiled: bool = False,
) -> Exported:
    """Write a model as an exported program, or compiled; see :meth:`lowrank_fx.LowRankModule.export_pt2`.

    Args:
        artifact: the model.
        path: the file.
        session: as for :func:`export_onnx`.
        example: likewise.
        tolerance: likewise.
        compiled: write an AOTInductor package, machine code for this processor.

    Raises:
        ExportError: the model cannot be exported or compiled, or the file does not compute what the model does. No file
            is left then.
    """
    with settled(artifact.program.device):
        check = _Check(subject(artifact, session, example), Path(path), tolerance)
        given = check.subject
        args, kwargs = given.plain_call([tensor.clone() for tensor in check.inputs[0]])
        program = exported(given.plain_module(), given, args, kwargs, dynamic=True)
        dimensions = dimension_names(input_shapes(program), given.input_names)
        plan = artifact.plan.to_json()
        with written(check.path) as temporary:
            if not compiled:
                export_to_torch.write_pt2(program, temporary, plan)
                ran = export_to_torch.run_pt2(temporary, given, check.inputs)
                return check.passed("pt2", "the exported program", ran, temporary, dimensions)
            # Inductor insists on the ending .pt2.
            package = temporary.with_name("package.pt2")
            export_to_torch.write_aoti(program, package, plan)
            ran = export_to_torch.run_aoti(package, given, check.inputs)
            package.replace(temporary)
            return check.passed("aoti", "the compiled package", ran, temporary, dimensions)


def export_torchscript(
    artifact: Artifact,
    path: str | os.PathLike[str],
    *,
    session: Session | None = None,
    example: Any = None,
    tolerance: float | None = None,
) -> Exported:
    """Write a model as TorchScript; see :meth:`lowrank_fx.LowRankModule.export_torchscript`.

    Args:
        artifact: the model.
        path: the file.
        session: as for :func:`export_onnx`.
        example: likewise.
        tolerance: likewise.

    Raises:
        ExportError: TorchScript does not take the model, or the file does not compute what the model does. No file is
            left then.
    """
    with settled(artifact.program.device):
        check = _Check(subject(artifact, session, example), Path(path), tolerance)
        dimensions = dimension_names(check.subject.shapes, check.subject.input_names)
        with written(check.path) as temporary:
            export_to_torch.write_torchscript(check.subject, check.leaves, temporary, artifact.plan.to_json())
            ran = export_to_torch.run_torchscript(temporary, check.inputs)
            return check.passed("torchscript", "TorchScript", ran, temporary, dimensions)


class _Check:
    """What a file has to compute.

    Args:
        given: the model.
        path: where the file goes.
        tolerance: the relative L2 error that is allowed; None for that of the model's dtype.
        dynamic: whether the sizes of the inputs may change.
    """

    def __init__(self, given: Subject, path: Path, tolerance: float | None, *, dynamic: bool = True) -> None:
        if path.is_dir() or not path.parent.is_dir():
            cause = "it is a folder" if path.is_dir() else "No such file or directory"
            raise ExportError(f"{path} cannot be written: {cause}")
        self.subject = given
        self.path = path
        self.inputs = check_inputs(given, dynamic=dynamic)
        self.leaves, tensors = given.output_names()
        self.outputs = [name for name, is_tensor in zip(self.leaves, tensors, strict=True) if is_tensor]
        self.expected = [given.flat_module()(*inputs) for inputs in self.inputs]
        self.dtype = coarsest_dtype(given.module, self.inputs[0])
        self.tolerance = TOLERANCES[self.dtype] if tolerance is None else tolerance

    def passed(
        self,
        kind: str,
        reader: str,
        ran: list[list[Tensor]],
        file: Path,
        dimensions: Mapping[str, str],
        *,
        opset: int | None = None,
        nodes: int | None = None,
        products: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Exported:
        """What is to be said of a file that computes what it has to.

        Args:
            kind: of the file.
            reader: who computed.
            ran: what.
            file: where it is now, alone in a folder with what belongs to it.
            dimensions: names of the dimensions that may change.
            opset: of ONNX.
            nodes: in the file.
            products: by factored site.

        Raises:
            ExportError: it computes something else; the message names the first output that differs.
        """
        worst: dict[str, float] = {}
        for values, expected, inputs in zip(ran, self.expected, self.inputs, strict=True):
            where = f"{reader}, on inputs of shape {', '.join(str(list(tensor.shape)) for tensor in inputs)},"
            for name, error in compare_outputs(self.outputs, values, expected, self.tolerance, where).items():
                worst[name] = max(worst.get(name, 0.0), error)
        given = self.subject
        return Exported(
            path=self.path,
            kind=kind,
            folded=given.artifact.folded,
            opset=opset,
            nodes=nodes,
            products=products or {},
            inputs=tuple(given.input_names),
            outputs=tuple(self.outputs),
            dynamic=tuple(dimensions.values()),
            errors=worst,
            tolerance=self.tolerance,
            source=given.source,
            batch_sizes=tuple(next((len(tensor) for tensor in inputs if tensor.dim()), 1) for inputs in self.inputs),
            bytes=sum(each.stat().st_size for each in file.parent.iterdir()),
        )
