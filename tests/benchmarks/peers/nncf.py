# SPDX-License-Identifier: Apache-2.0
"""NNCF's post-training quantization of an ONNX model, run in ONNX Runtime: defaults, and the preset `mixed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from work import Work

VARIANTS = {"defaults": "nncf, defaults", "mixed": "nncf, preset mixed"}
IMPORTS = ("onnx", "nncf")


def make(work: Work) -> Path:
    import nncf
    import onnx

    rows = list(work.samples())
    settings: dict[str, Any] = {"subset_size": len(rows)}
    if work.variant == "mixed":
        settings["preset"] = nncf.QuantizationPreset.MIXED
    made = nncf.quantize(onnx.load(work.source("onnx")), nncf.Dataset(rows), **settings)
    target = work.output("model.onnx")
    onnx.save(made, target)
    return target
