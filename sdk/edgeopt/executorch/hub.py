# SPDX-License-Identifier: Apache-2.0
"""From a float ONNX model to a graph that integers are written into, and from there to a .pte program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgeopt.executorch.linears import spell_linears
from edgeopt.onnx_graphs import fold
from edgeopt_converters import path as conversion
from edgeopt_converters.executorch_file import NOISY
from edgeopt_converters.model import Model
from edgeopt_converters.quiet import quiet
from edgeopt_converters.torch_program import export_module
from edgeopt_converters.torch_spellings import spell_gelus
from edgeopt_converters.torch_to_executorch import lower_program


def enter(model: Model) -> tuple[Model, Any]:
    """Give the model in the hub, folded, and a graph module of it whose products are linear layers where they can be.

    Raises:
        UnsupportedError: An operator cannot enter the hub.
    """
    hub = conversion.convert(replace(model, program=fold(model.program)), "torch")
    module = hub.program.module(check_guards=False)
    spell_gelus(module)
    spell_linears(module)
    return hub, module


def lower(module: Any, hub: Model, write: Any) -> Model:
    """Let `write` put integers into the module, then export and lower it for the XNNPACK delegate.

    Raises:
        UnsupportedError: ExecuTorch has no lowering or no kernel for an operator; the message names it.
    """
    with quiet(*NOISY):
        write()
        _forget_unused(module)
        program = lower_program(export_module(module, hub.inputs), hub.name)
    return replace(hub, format="executorch", program=program)


def _forget_unused(module: Any) -> None:
    """Drop tensors that no operator reads any more: an export would carry them into the file."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [*dict(module.named_parameters()), *dict(module.named_buffers())]:
        if name not in used:
            owner, _, last = name.rpartition(".")
            delattr(module.get_submodule(owner), last)
