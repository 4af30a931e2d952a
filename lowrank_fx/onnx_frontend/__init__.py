"""ONNX in, ONNX out: for models whose PyTorch source is gone. Needs the extra ``onnx``, when it is called."""

from __future__ import annotations

from lowrank_fx.onnx_frontend.compress import OnnxResult, onnx_compress

__all__ = ["OnnxResult", "onnx_compress"]
