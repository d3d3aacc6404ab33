# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose activations are quantized in every inference, and tables of integers, in an exported graph.

Rules (executorch 1.5, backends/xnnpack):
- A layer reads choose_qparams -> quantize -> dequantize of its input; the delegate takes the three as one conversion,
  each row (a token of a transformer) by its own smallest and largest value, multiplies int8 and writes floats.
- Weights are int8, symmetric per output channel, scale = max|w| / 127. Every layer has a conversion of its own: the
  partitioner takes it together with the layer.
- A table that is looked up keeps int8 rows with a scale each, which turn float behind the lookup.
"""

from __future__ import annotations

from typing import Any

from edgeopt.executorch.grids import HIGHEST, LOWEST, per_channel
from edgeopt.executorch.places import Product, kind_of, tensor_of

_LARGEST = 127
_EPSILON = 2.0**-23
"""The smallest scale of an activation, as PT2E's own observer has it."""


def write_layers(module: Any, layers: list[Product]) -> None:
    """Quantize these linear layers, in place."""
    import torch
    from torch.ao.quantization.fx import _decomposed  # noqa: F401 - it registers the operators

    operators, graph = torch.ops.quantized_decomposed, module.graph
    for number, layer in enumerate(layers):
        weight = tensor_of(module, layer.weight)
        scales = (weight.abs().amax(dim=1) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        layer.node.update_arg(1, per_channel(module, layer, scales, number))
        source, ends = layer.node.args[0], (LOWEST, HIGHEST)
        with graph.inserting_before(layer.node):
            found = graph.call_function(
                operators.choose_qparams.tensor, (source, *ends, _EPSILON, torch.int8)
            )
            grid = [graph.call_function(_item(), (found, place)) for place in (0, 1)]
            integers = graph.call_function(
                operators.quantize_per_tensor.tensor, (source, *grid, *ends, torch.int8)
            )
            real = graph.call_function(
                operators.dequantize_per_tensor.tensor, (integers, *grid, *ends, torch.int8)
            )
        layer.node.update_arg(0, real)
    _finish(module)


def write_tables(module: Any, excluded: frozenset[str] = frozenset()) -> int:
    """Store looked-up tables as int8 rows with a scale each, in place; gives how many."""
    import torch

    count = 0
    for node in list(module.graph.nodes):
        if kind_of(node) != "embedding.default" or node.args[0].op != "get_attr" or node.name in excluded:
            continue
        table = tensor_of(module, node.args[0])
        if not table.is_floating_point():
            continue
        scales = (table.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        stored = {
            f"edgeopt_table_{count}": torch.round(table / scales).clamp(-_LARGEST, _LARGEST).to(torch.int8),
            f"edgeopt_rows_{count}": scales,
        }
        for name, tensor in stored.items():
            module.register_buffer(name, tensor)
        with module.graph.inserting_before(node):
            rows, sizes = (
                module.graph.call_function(
                    torch.ops.aten.embedding.default, (module.graph.get_attr(name), node.args[1])
                )
                for name in stored
            )
            real = module.graph.call_function(torch.ops.aten.to.dtype, (rows, torch.float32))
            value = module.graph.call_function(torch.ops.aten.mul.Tensor, (real, sizes))
        node.replace_all_uses_with(value)
        count += 1
    _finish(module)
    return count


def _item() -> Any:
    import operator

    return operator.getitem


def _finish(module: Any) -> None:
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
