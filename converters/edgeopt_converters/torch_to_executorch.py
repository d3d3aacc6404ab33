# SPDX-License-Identifier: Apache-2.0
"""PyTorch to ExecuTorch (.pte), delegated to XNNPACK, the CPU kernels of phones and boards.

Rules:
- Shapes are static. Inputs and outputs keep their order, axes (NCHW) and types: a .pte file gives them no names, so
  that their place says which is which.
- What XNNPACK does not take runs in ExecuTorch's own kernels, which are right and slower (`edgeopt.coverage` names
  it). What those do not have either is refused here, with its name, and not first on a device.
- The same program gives the same bytes.
"""

from __future__ import annotations

import os
from typing import Any

from edgeopt_converters.executorch_file import NOISY
from edgeopt_converters.model import Model
from edgeopt_converters.quiet import quiet
from edgeopt_converters.torch_program import export_module
from edgeopt_converters.torch_spellings import spell_gelus
from edgeopt_wire.errors import UnsupportedError

SOURCE = "torch"
TARGET = "executorch"
COST = 10.0
EXTRA = "executorch"
MODULES = ("torch", "executorch")


def convert(model: Model) -> Model:
    """Lower to a program for the XNNPACK delegate, in the number formats that the graph has.

    Raises:
        UnsupportedError: ExecuTorch has no lowering or no kernel for an operator; the message names it.
    """
    with quiet(*NOISY):
        program = lower_program(_spelled(model), model.name)
    return Model(TARGET, program, model.name, model.inputs, model.outputs)


def _spelled(model: Model) -> Any:
    """The program with GELU as one operator, which the delegate has; written out it takes a scalar kernel."""
    program = model.program
    if not any(str(node.target) == "aten.erf.default" for node in program.graph.nodes):
        return program
    module = program.module(check_guards=False)
    spell_gelus(module)
    return export_module(module, model.inputs)


def lower_program(program: Any, name: str) -> bytes:
    """Lower an exported program, float or with quantize and dequantize nodes as PT2E places them.

    Raises:
        UnsupportedError: As `convert`.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        made = bytes(lowered.buffer)
    except Exception as error:  # PyTorch and ExecuTorch raise what they like; all mean that it cannot
        raise UnsupportedError(f"{name}: ExecuTorch cannot lower this model: {_cause(error)}") from error
    _check_kernels(lowered.executorch_program, name)
    return made


def _check_kernels(program: Any, name: str) -> None:
    """Every operator outside delegates must have a kernel in the runtime that a device installs."""
    known = set(_runtime().operator_registry.operator_names)
    wanted = {
        f"{operator.name}.{operator.overload}" if operator.overload else operator.name
        for plan in program.execution_plan
        for operator in plan.operators
    }
    missing = sorted(wanted - known)
    if missing:
        raise UnsupportedError(
            f"{name}: ExecuTorch's runtime has no kernel for {', '.join(missing)}; keep the model in ONNX, or export it "
            "without this operator"
        )


def _runtime() -> Any:
    """ExecuTorch's runtime; while it is loaded it tells stderr which files about the CPU it opened, past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        from executorch.runtime import Runtime

        return Runtime.get()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _cause(error: BaseException) -> str:
    """The first lines of what the libraries say; the rest is a dump of the whole program."""
    lines = [line.strip() for line in f"{error}".splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:500]}"
