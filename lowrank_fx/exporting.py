"""The ways out of an optimized model, as methods: ONNX, exported program, machine code, TorchScript."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, Literal

from lowrank_fx import export
from lowrank_fx.export import Exported
from lowrank_fx.session import Session
from lowrank_fx.storage import Artifact


class Exporting:
    """What :class:`~lowrank_fx.LowRankModule` inherits its exports from.

    Every file is checked before it gets its name: it is read back and run on two batch sizes.
    """

    artifact: Artifact
    session: Session | None

    if TYPE_CHECKING:

        def fold(self) -> Exporting:
            """The same model with dense layers again."""

    def _exported(self, fold: bool) -> Artifact:
        return (self.fold() if fold else self).artifact

    def export_onnx(
        self,
        path: str | os.PathLike[str],
        *,
        fold: bool = False,
        dynamic: bool = True,
        opset: int | None = None,
        external_data: bool | Literal["auto"] = "auto",
        example: Any = None,
        tolerance: float | None = None,
    ) -> Exported:
        """Write the model as an ONNX file that onnxruntime was seen to compute the same with. Needs the extra ``onnx``.

        Inputs and outputs are tensors with the names that ``forward`` and its output have: the keys of a dictionary or
        of an output class, joined by dots where they are nested (``past_key_values.key_cache.0``). A factored layer is
        two nodes, a folded one a single node with the dense weight. The plan is in the file's metadata.

        Args:
            path: the file; its folder must exist.
            fold: one dense node per layer, as :meth:`fold` makes them.
            dynamic: the batch, and the sequence, may change as they may here; False fixes every size to that of
                ``example``, or of the inputs that the file is checked with.
            opset: of the file; by default the exporter's own.
            external_data: weights in a file of their own, ``path`` with ``.data`` behind it; ``"auto"`` where they
                exceed the 2 GB that an ONNX file may have.
            example: a batch that the file is checked with, as a loader yields it, or the arguments of ``forward`` as
                ``(tuple, dict)``. By default held-out rows of the calibration, or random values where the module was
                loaded or folded.
            tolerance: the relative L2 error of an output that is allowed; by default 1e-5 for float32 and float64,
                8 eps for bfloat16 and float16.

        Returns:
            What was written, and how far it was from the model.

        Raises:
            ExportError: the model cannot be converted, the runtime does not take it, it computes something else, or a
                package is missing; no file is left.
            OptionError: ``external_data`` is not legal.
        """
        return export.export_onnx(
            self._exported(fold),
            path,
            session=self.session,
            dynamic=dynamic,
            opset=opset,
            external_data=external_data,
            example=example,
            tolerance=tolerance,
        )

    def export_pt2(
        self, path: str | os.PathLike[str], *, fold: bool = False, example: Any = None, tolerance: float | None = None
    ) -> Exported:
        """Write the model as an exported program: ``torch.export.load(path).module()`` needs torch and nothing else.

        It is called as the model was captured, and returns dictionaries, lists and tuples instead of other
        classes. The plan lies in it as the extra file ``plan.json``.

        Args:
            path: the file; its folder must exist.
            fold: as for :meth:`export_onnx`.
            example: likewise.
            tolerance: likewise.

        Raises:
            ExportError: the model cannot be exported, or the file computes something else; no file is left.
        """
        return export.export_pt2(self._exported(fold), path, session=self.session, example=example, tolerance=tolerance)

    def export_aoti(
        self, path: str | os.PathLike[str], *, fold: bool = False, example: Any = None, tolerance: float | None = None
    ) -> Exported:
        """Write the model as machine code for this processor: ``torch._inductor.aoti_load_package(path)`` runs it.

        It is called as for :meth:`export_pt2`; ``get_metadata()`` of what is loaded holds the plan.

        Args:
            path: the file; its folder must exist.
            fold: as for :meth:`export_onnx`.
            example: likewise.
            tolerance: likewise.

        Raises:
            ExportError: torch finds no C++ compiler, the model cannot be compiled, or the package computes something
                else; no file is left.
        """
        return export.export_pt2(
            self._exported(fold), path, session=self.session, example=example, tolerance=tolerance, compiled=True
        )

    def export_torchscript(
        self, path: str | os.PathLike[str], *, fold: bool = True, example: Any = None, tolerance: float | None = None
    ) -> Exported:
        """Write the model as TorchScript, which torch has deprecated: for runtimes that take nothing newer.

        It takes the tensors among the inputs by position, and returns one tensor, a tuple of them, or a flat dictionary
        with the names that :meth:`export_onnx` gives. The plan lies in it as the extra file ``plan.json``.

        Args:
            path: the file; its folder must exist.
            fold: as for :meth:`export_onnx`.
            example: likewise.
            tolerance: likewise.

        Raises:
            ExportError: TorchScript does not take the model, or the file computes something else; no file is left.
        """
        warnings.warn(
            "torch has deprecated TorchScript; export_pt2 writes what replaces it", DeprecationWarning, stacklevel=2
        )
        return export.export_torchscript(
            self._exported(fold), path, session=self.session, example=example, tolerance=tolerance
        )
