# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's own quantizer, as its documentation says: pre-process, then QDQ or dynamic.

U8S8 and per channel is what it recommends for x86-64 with VNNI. Its calibrators keep all activations of all samples;
`CalibMaxIntermediateOutputs` bounds that for entropy and percentile. With min-max that option raises "No data is
collected" where the number of samples is a multiple of it, so min-max is used without. `int4_onnxruntime` has the other
ways of 4-bit weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from work import Unavailable, Work

VARIANTS = {
    "defaults": "onnxruntime, defaults",
    "minmax": "onnxruntime, U8S8 per channel, min-max",
    "percentile": "onnxruntime, U8S8 per channel, percentile",
    "entropy": "onnxruntime, U8S8 per channel, entropy",
    "dynamic": "onnxruntime, dynamic",
    "int4-rtn": "onnxruntime, int4 weights, nearest",
}
IMPORTS = ("onnxruntime.quantization", "onnxruntime.quantization.shape_inference")
HELD_SAMPLES = 8
GROUP, INTEGER_PRODUCTS = 64, 4
"""Of 4-bit weights: values that share a scale, and the accuracy level that multiplies in int8."""


def make(work: Work) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    if work.variant.startswith("int4"):
        return _compress(work)
    source, target = work.output("prepared.onnx"), work.output("model.onnx")
    _prepare(work.source("onnx"), source)
    if work.variant == "dynamic":
        quantize_dynamic(str(source), str(target))
        return target
    settings: dict[str, Any] = {}
    if work.variant != "defaults":
        settings = {
            "per_channel": True,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            **_method(work.variant),
        }
    quantize_static(str(source), str(target), _reader(work), **settings)
    return target


def _prepare(source: Path, target: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source), str(target), skip_symbolic_shape=True)


def _method(variant: str) -> dict[str, Any]:
    from onnxruntime.quantization import CalibrationMethod

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    if variant not in methods:
        raise Unavailable(f"no variant {variant!r}; known: {', '.join(VARIANTS)}")
    found: dict[str, Any] = {"calibrate_method": methods[variant]}
    if variant != "minmax":
        found["extra_options"] = {"CalibMaxIntermediateOutputs": HELD_SAMPLES}
    return found


def _reader(work: Work) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.rows = work.samples()

        def get_next(self) -> Any:
            return next(self.rows, None)

    return Reader()


def _compress(work: Work) -> Path:
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    config = nbits.DefaultWeightOnlyQuantConfig(
        block_size=GROUP, is_symmetric=True, accuracy_level=INTEGER_PRODUCTS
    )
    maker = nbits.MatMulNBitsQuantizer(
        onnx.load(work.source("onnx")), block_size=GROUP, is_symmetric=True, accuracy_level=INTEGER_PRODUCTS,
        algo_config=config,
    )  # fmt: skip
    maker.process()
    target = work.output("model.onnx")
    maker.model.save_model_to_file(str(target))
    return target
