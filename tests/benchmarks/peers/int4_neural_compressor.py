# SPDX-License-Identifier: Apache-2.0
"""Intel's ONNX Neural Compressor: matrices in 4 bits by nearest, GPTQ or AWQ; it has nothing for tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewinding import reader
from work import Work

VARIANTS = {
    "rtn": "neural-compressor, int4 weights, nearest",
    "gptq": "neural-compressor, int4 weights, GPTQ",
    "awq": "neural-compressor, int4 weights, AWQ",
}
IMPORTS = ("onnx", "onnxruntime", "onnx_neural_compressor.quantization.matmul_nbits_quantizer")
GROUP, INTEGER_PRODUCTS = 64, 4


def make(work: Work) -> Path:
    import onnx
    from onnx_neural_compressor.quantization import matmul_nbits_quantizer as nbits

    configs: dict[str, Any] = {
        "rtn": nbits.RTNWeightOnlyQuantConfig,
        "gptq": lambda: nbits.GPTQWeightOnlyQuantConfig(_reader(work), perchannel=True),
        "awq": lambda: nbits.AWQWeightOnlyQuantConfig(_reader(work)),
    }
    maker = nbits.MatMulNBitsQuantizer(
        onnx.load(work.source("onnx")), block_size=GROUP, is_symmetric=True, accuracy_level=INTEGER_PRODUCTS,
        algo_config=configs[work.variant](), n_bits=4,
    )  # fmt: skip
    maker.process()
    target = work.output("model.onnx")
    made = maker.model
    onnx.save(getattr(made, "model", made), target)
    return target


def _reader(work: Work) -> Any:
    from onnx_neural_compressor import data_reader

    return reader(data_reader.CalibrationDataReader, work)
