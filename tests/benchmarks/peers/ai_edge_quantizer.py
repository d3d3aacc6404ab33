# SPDX-License-Identifier: Apache-2.0
"""Google's quantizer for LiteRT files: static int8 with its own calibration, and dynamic int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from work import Work, layout_for

if TYPE_CHECKING:
    import numpy as np

VARIANTS = {
    "static": "ai-edge-quantizer, static, float edges",
    "dynamic": "ai-edge-quantizer, dynamic",
}
IMPORTS = ("ai_edge_litert.interpreter", "ai_edge_quantizer")


def make(work: Work) -> Path:
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import algorithm_manager, quantizer, recipe
    from ai_edge_quantizer.qtyping import TFLOperationName

    source, target = work.source("litert"), work.output("model.tflite")
    maker = quantizer.Quantizer(str(source))
    if work.variant == "dynamic":
        maker.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        target.write_bytes(maker.quantize(enable_progress_report=False).quantized_model)
        return target
    maker.load_quantization_recipe(recipe.static_wi8_ai8())
    for edge in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
        maker.update_quantization_recipe(
            regex=".*", operation_name=edge, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE
        )
    interpreter = Interpreter(str(source))
    key = next(iter(interpreter.get_signature_list()))
    inputs = interpreter.get_signature_runner(key).get_input_details()
    rows = [_named(inputs, list(sample.values())) for sample in work.samples()]
    result = maker.quantize(maker.calibrate({key: rows}, num_threads=1), enable_progress_report=False)
    target.write_bytes(result.quantized_model)
    return target


def _named(inputs: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """A sample by the signature's names, args_0 and so on in the order of the float model's inputs."""
    names = sorted(inputs, key=lambda name: int(name.rpartition("_")[2]) if name[-1].isdigit() else 0)
    pairs = zip(names, arrays, strict=False)  # inputs that became constants come last
    return {
        name: layout_for(array, tuple(inputs[name]["shape"])).astype(inputs[name]["dtype"])
        for name, array in pairs
    }
