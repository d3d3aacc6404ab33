# SPDX-License-Identifier: Apache-2.0
"""torchao's PT2E post-training quantization of the exported program, saved for ONNX Runtime as a user would.

The x86 quantizer's default configuration; the converted program goes through `torch.onnx.export`.
"""

from __future__ import annotations

from pathlib import Path

from work import Work

VARIANTS = {"x86": "torchao PT2E, X86 quantizer, ONNX"}
IMPORTS = ("torch", "torchao.quantization.pt2e", "onnx")


def make(work: Work) -> Path:
    import torch
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    program = torch.export.load(work.source("torch"))
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    wanted = len(program.graph_signature.user_inputs)  # inputs that became constants come last
    prepared = prepare_pt2e(program.module(), quantizer)
    example: tuple[torch.Tensor, ...] = ()
    with torch.no_grad():
        for sample in work.samples():
            example = tuple(torch.from_numpy(array) for array in sample.values())[:wanted]
            prepared(*example)
        converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)
        target = work.output("model.onnx")
        torch.onnx.export(converted, example, str(target), dynamo=True, external_data=False)
    return target
