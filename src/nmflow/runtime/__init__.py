"""Compressed N:M models: the format, the layers that compute with it, files, and the proof that a model is N:M."""

from __future__ import annotations

from nmflow.runtime.blocks import BrokenBlock
from nmflow.runtime.compress_files import compress_file
from nmflow.runtime.convert import compress, decompress, is_compressed
from nmflow.runtime.files import load_compressed, save_compressed, save_model
from nmflow.runtime.format import CompressedNM
from nmflow.runtime.fuse import fuse_activations
from nmflow.runtime.inference import StreamedLinear, for_inference
from nmflow.runtime.modules import NMConv2d, NMLinear
from nmflow.runtime.report import CompressionReport, LayerReport, compression_report
from nmflow.runtime.tuning import Tuned, tune
from nmflow.runtime.verification import LayerCheck, VerifyReport, verify

__all__ = [
    "BrokenBlock", "CompressedNM", "CompressionReport", "LayerCheck", "LayerReport", "NMConv2d", "NMLinear",
    "StreamedLinear", "Tuned", "VerifyReport", "compress", "compress_file", "compression_report", "decompress",
    "for_inference", "fuse_activations", "is_compressed", "load_compressed", "save_compressed", "save_model", "tune",
    "verify",
]  # fmt: skip
