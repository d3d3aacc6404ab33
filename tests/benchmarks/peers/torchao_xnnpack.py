# SPDX-License-Identifier: Apache-2.0
"""torchao's PT2E post-training quantization with ExecuTorch's XNNPACK quantizer, as ExecuTorch's documentation says."""

from __future__ import annotations

from pathlib import Path

from work import Work

VARIANTS = {"xnnpack": "torchao PT2E, XNNPACK quantizer, ExecuTorch"}
IMPORTS = (
    "torch",
    "torchao.quantization.pt2e.quantize_pt2e",
    "executorch.exir",
    "executorch.backends.xnnpack.quantizer.xnnpack_quantizer",
    "executorch.backends.xnnpack.partition.xnnpack_partitioner",
)


def make(work: Work) -> Path:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    program = torch.export.load(work.source("torch"))
    wanted = len(program.graph_signature.user_inputs)  # inputs that became constants come last
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    prepared = prepare_pt2e(program.module(), xnnpack.XNNPACKQuantizer().set_global(config))
    example: tuple[torch.Tensor, ...] = ()
    with torch.no_grad():
        for sample in work.samples():
            example = tuple(torch.from_numpy(array) for array in sample.values())[:wanted]
            prepared(*example)
        exported = torch.export.export(convert_pt2e(prepared), example)
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    target = work.output("model.pte")
    target.write_bytes(lowered.buffer)
    return target
