# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's weight-only quantizer with all that it offers: tables in 4 bits too, GPTQ with its better settings.

`onnxruntime.py` has it as its documentation shows it, matrices only. GPTQ and HQQ take no tables: they are quantized to
nearest in a second call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewinding import reader
from work import Work

VARIANTS = {
    "rtn": "onnxruntime, int4 weights and tables, nearest",
    "kquant": "onnxruntime, int4 weights k-quant, tables nearest",
    "hqq": "onnxruntime, int4 weights HQQ, tables nearest",
    "gptq": "onnxruntime, int4 weights GPTQ, tables nearest",
    "gptq-order": "onnxruntime, int4 weights GPTQ (actorder, mse), tables nearest",
}
IMPORTS = ("onnx", "onnxruntime.quantization", "onnxruntime.quantization.matmul_nbits_quantizer")
GROUP, INTEGER_PRODUCTS = 64, 4
"""Values that share a scale, and the accuracy level that multiplies in int8."""

MATRICES, TABLES = ("MatMul",), ("Gather",)


def make(work: Work) -> Path:
    import onnx

    program = onnx.load(work.source("onnx"))
    if work.variant == "rtn":
        made = _quantized(program, _config(work, (*MATRICES, *TABLES)))
    else:
        made = _quantized(program, _config(work, MATRICES))
        made = _quantized(made.model, _nearest(TABLES))
    target = work.output("model.onnx")
    made.save_model_to_file(str(target))
    return target


def _quantized(program: Any, config: Any) -> Any:
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    settings = {"block_size": GROUP, "is_symmetric": True, "accuracy_level": INTEGER_PRODUCTS}
    maker = nbits.MatMulNBitsQuantizer(program, algo_config=config, **settings)
    maker.process()
    return maker.model


def _nearest(kinds: tuple[str, ...]) -> Any:
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    return nbits.DefaultWeightOnlyQuantConfig(
        block_size=GROUP,
        is_symmetric=True,
        accuracy_level=INTEGER_PRODUCTS,
        op_types_to_quantize=kinds,
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )


def _config(work: Work, kinds: tuple[str, ...]) -> Any:
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    if work.variant == "rtn":
        return _nearest(kinds)
    if work.variant == "kquant":
        return nbits.KQuantWeightOnlyQuantConfig(op_types_to_quantize=kinds)
    if work.variant == "hqq":
        return nbits.HQQWeightOnlyQuantConfig(block_size=GROUP, bits=4, op_types_to_quantize=kinds)
    is_best = work.variant == "gptq-order"
    return nbits.GPTQWeightOnlyQuantConfig(
        calibration_data_reader=_reader(work),
        block_size=GROUP,
        actorder=is_best,
        mse=is_best,
        perchannel=True,
        op_types_to_quantize=kinds,
    )


def _reader(work: Work) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    return reader(CalibrationDataReader, work)
