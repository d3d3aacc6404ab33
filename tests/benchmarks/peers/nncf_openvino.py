# SPDX-License-Identifier: Apache-2.0
"""NNCF's post-training quantization of the model as OpenVINO reads it, saved in OpenVINO's own form: its home."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from work import Work

if TYPE_CHECKING:
    import numpy as np

VARIANTS = {"defaults": "nncf in OpenVINO, defaults", "mixed": "nncf in OpenVINO, preset mixed"}
IMPORTS = ("openvino", "nncf")


def make(work: Work) -> Path:
    import nncf
    import openvino

    rows = list(work.samples())
    settings: dict[str, Any] = {"subset_size": len(rows)}
    if work.variant == "mixed":
        settings["preset"] = nncf.QuantizationPreset.MIXED
    model = openvino.Core().read_model(str(work.source("onnx")))
    _fix_shapes(model, rows[0])
    made = nncf.quantize(model, nncf.Dataset(rows), **settings)
    target = work.output("model.xml")
    openvino.save_model(made, str(target), compress_to_fp16=False)
    return target


def _fix_shapes(model: Any, sample: dict[str, np.ndarray]) -> None:
    """Free axes get the lengths of the samples."""
    if model.is_dynamic():
        model.reshape({name: list(array.shape) for name, array in sample.items()})
