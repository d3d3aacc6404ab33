# SPDX-License-Identifier: Apache-2.0
"""NNCF's post-training quantization of an ONNX model, run in ONNX Runtime.

Static int8 with its defaults and the preset `mixed`; weights of 4 bits in groups of 64, plain and with what it offers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from work import Work

VARIANTS = {
    "defaults": "nncf, defaults",
    "mixed": "nncf, preset mixed",
    "int4": "nncf, int4 weights, nearest",
    "int4-awq": "nncf, int4 weights, AWQ",
    "int4-scales": "nncf, int4 weights, AWQ and scale estimation",
    "int4-gptq": "nncf, int4 weights, GPTQ",
}
IMPORTS = ("onnx", "nncf")
GROUP = 64


def make(work: Work) -> Path:
    import nncf
    import onnx

    if work.variant.startswith("int4"):
        return _compress(work)
    rows = list(work.samples())
    settings: dict[str, Any] = {"subset_size": len(rows)}
    if work.variant == "mixed":
        settings["preset"] = nncf.QuantizationPreset.MIXED
    made = nncf.quantize(onnx.load(work.source("onnx")), nncf.Dataset(rows), **settings)
    target = work.output("model.onnx")
    onnx.save(made, target)
    return target


def _compress(work: Work) -> Path:
    import nncf
    import onnx

    asked: dict[str, dict[str, Any]] = {
        "int4": {},
        "int4-awq": {"awq": True},
        "int4-scales": {"awq": True, "scale_estimation": True},
        "int4-gptq": {"gptq": True},
    }
    settings = asked[work.variant]
    if settings:
        settings["dataset"] = nncf.Dataset(list(work.samples()))
    mode = nncf.CompressWeightsMode.INT4_SYM
    made = nncf.compress_weights(onnx.load(work.source("onnx")), mode=mode, group_size=GROUP, **settings)
    target = work.output("model.onnx")
    onnx.save(made, target)
    return target
