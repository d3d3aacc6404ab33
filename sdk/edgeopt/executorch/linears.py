# SPDX-License-Identifier: Apache-2.0
"""Products with a stored matrix spelled as linear layers, the one form that the delegate computes in integers.

What comes from ONNX multiplies by a matrix (in, out), adds the bias behind that, or transposes the weights first; a
linear layer of ATen stores them (out, in) and has its bias inside. The numbers stay what they are.
"""

from __future__ import annotations

from typing import Any

from edgeopt.executorch.places import kind_of, tensor_of

_TRANSPOSES = ("transpose.int", "permute.default", "t.default")


def spell_linears(module: Any) -> None:
    """Rewrite a graph module of the ATen dialect, in place."""
    for node in list(module.graph.nodes):
        kind = kind_of(node)
        if kind == "matmul.default" and _is_matrix(module, node.args[1]) and _rank(node.args[0]) > 1:
            _spell(module, node, tensor_of(module, node.args[1]).t())
        elif kind == "linear.default" and kind_of(node.args[1]) in _TRANSPOSES:
            stored = node.args[1].args[0]
            if _is_matrix(module, stored):  # of two axes, so that it can only swap them
                node.update_arg(1, _stored(module, node, tensor_of(module, stored).t()))
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def _spell(module: Any, node: Any, weight: Any) -> None:
    import torch

    end, bias = _bias(module, node, weight.shape[0])
    with module.graph.inserting_before(end):
        arguments = (node.args[0], _stored(module, end, weight), *(() if bias is None else (bias,)))
        linear = module.graph.call_function(torch.ops.aten.linear.default, arguments)
    linear.meta = dict(end.meta)
    end.replace_all_uses_with(linear)


def _bias(module: Any, node: Any, outputs: int) -> tuple[Any, Any]:
    """The sum behind a product that only adds one number an output, and those numbers; else the product and None."""
    readers = list(node.users)
    if len(readers) != 1 or kind_of(readers[0]) != "add.Tensor" or readers[0].kwargs.get("alpha", 1) != 1:
        return node, None
    others = [entry for entry in readers[0].args if entry is not node]
    if len(others) != 1 or getattr(others[0], "op", "") != "get_attr":
        return node, None
    fits = tuple(tensor_of(module, others[0]).shape) == (outputs,)
    return (readers[0], others[0]) if fits else (node, None)


def _stored(module: Any, before: Any, weight: Any) -> Any:
    name = f"edgeopt_linear_{sum(key.startswith('edgeopt_linear_') for key in dict(module.named_buffers()))}"
    module.register_buffer(name, weight.contiguous())
    with module.graph.inserting_before(before):
        found = module.graph.get_attr(name)
    found.meta["val"] = weight
    return found


def _is_matrix(module: Any, node: Any) -> bool:
    if getattr(node, "op", "") != "get_attr":
        return False
    tensor = tensor_of(module, node)
    return bool(tensor.dim() == 2 and tensor.is_floating_point())


def _rank(node: Any) -> int:
    value = node.meta.get("val")
    return 0 if value is None else int(value.dim())
