# SPDX-License-Identifier: Apache-2.0
"""PyTorch to ONNX, by PyTorch's own exporter.

Rules:
- The same program gives the same bytes: what the exporter writes about where the code stood is taken out.
- Opset 18, the oldest that the exporter writes without converting back, and the file version that belongs to it, so
  that ONNX Runtime from 1.14 on can load the file.
- Tensors keep the names that the program gives them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgeopt_converters.model import Model
from edgeopt_converters.onnx_file import edges
from edgeopt_converters.quiet import quiet
from edgeopt_wire.errors import RecipeError, UnsupportedError

SOURCE = "torch"
TARGET = "onnx"
COST = 5.0
EXTRA = "torch"
MODULES = ("torch", "onnx", "onnxscript")

OPSET = 18
IR_VERSION = 8  # what ONNX 1.13 wrote, the first release with opset 18
_EXPORTER = "torch.onnx"
"""Its logger: it talks about torchvision, its own deprecations and each step that it takes."""

MAX_BYTES = 2**31 - 1  # of a protobuf message


def convert(model: Model) -> Model:
    """Export with static shapes; batch normalization is folded into convolutions by the exporter.

    Raises:
        UnsupportedError: PyTorch has no ONNX form of an operator; the message names it.
        RecipeError: The weights are more than one ONNX file can hold (2 GiB).
    """
    weights_bytes = sum(tensor.nbytes for tensor in model.program.state_dict.values())
    if weights_bytes > MAX_BYTES:
        raise RecipeError(
            f"{model.name}: {weights_bytes / 2**30:.1f} GiB of weights do not fit an ONNX file (2 GiB); "
            "quantize or prune the model first"
        )
    program = _exported(model, optimize=True).model_proto
    _forget_origin(program)
    _check_opsets(program, model.name)
    inputs, outputs = edges(program)
    return Model(
        format=TARGET,
        program=program,
        name=model.name,
        inputs=tuple(
            replace(found, layout=given.layout) for found, given in zip(inputs, model.inputs, strict=True)
        ),
        outputs=tuple(
            replace(found, layout=given.layout) for found, given in zip(outputs, model.outputs, strict=True)
        ),
    )


def with_batch_norms(model: Model) -> Any:
    """Export with batch normalizations as they are, for whoever wants to read them; constants are folded.

    Raises:
        UnsupportedError: PyTorch has no ONNX form of an operator; the message names it.
    """
    from onnxscript import optimizer

    exported = _exported(model, optimize=False)
    with quiet(_EXPORTER):
        optimizer.fold_constants(exported.model)
        optimizer.remove_unused_nodes(exported.model)
    return exported.model_proto


def _exported(model: Model, *, optimize: bool) -> Any:
    import torch

    try:
        with quiet(_EXPORTER):
            return torch.onnx.export(
                model.program,
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                verbose=False,
                optimize=optimize,
            )
    except Exception as error:  # the exporter raises its own and others' errors; all mean that it cannot
        raise UnsupportedError(
            f"{model.name}: PyTorch cannot export this model to ONNX: {_cause(error)}"
        ) from error


def _check_opsets(program: Any, name: str) -> None:
    """Refuse operators of PyTorch's own domain, which no runtime has."""
    found = {opset.domain: opset.version for opset in program.opset_import}
    foreign = sorted({node.op_type for node in program.graph.node if node.domain not in ("", "ai.onnx")})
    if found.get("") != OPSET or foreign:
        raise UnsupportedError(
            f"{name}: expected operators of ONNX opset {OPSET} only, the exporter wrote {found}"
            + (f" with {', '.join(foreign)}" if foreign else "")
        )


def _forget_origin(program: Any) -> None:
    """Take out stack traces, source paths and the exporter's version: they differ where the model does not."""
    program.producer_name, program.producer_version, program.doc_string = "edgeopt", "", ""
    program.ir_version = IR_VERSION
    del program.metadata_props[:]
    graph = program.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]


def _cause(error: BaseException) -> str:
    """The innermost error, where the exporter names the operator; the outer ones are advice to PyTorch's developers."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__) is not None:
        chain.append(inner)
    return (
        "; ".join(dict.fromkeys(f"{link}".partition("\n")[0] for link in reversed(chain[1:]))) or f"{error}"
    )
