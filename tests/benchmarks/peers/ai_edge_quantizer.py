# SPDX-License-Identifier: Apache-2.0
"""Google's quantizer for LiteRT files: static int8 with its own calibration, and dynamic int8."""

from __future__ import annotations

from pathlib import Path

from work import Work, layout_for

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
    key, signature = next(iter(interpreter.get_signature_list().items()))
    shape = tuple(interpreter.get_input_details()[0]["shape"].tolist())
    name = signature["inputs"][0]
    rows = [{name: layout_for(next(iter(sample.values())), shape)} for sample in work.samples()]
    result = maker.quantize(maker.calibrate({key: rows}, num_threads=1), enable_progress_report=False)
    target.write_bytes(result.quantized_model)
    return target
