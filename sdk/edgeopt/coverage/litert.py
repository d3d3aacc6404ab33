# SPDX-License-Identifier: Apache-2.0
"""What LiteRT makes of a flatbuffer: the interpreter loads it with its XNNPACK delegate and tells its operators.

An operator computes in the type of its first operand and its result. Float activations with int8 weights are
"dynamic": the runtime quantizes the activations in every inference. Which operators the delegate took is what can be
reached backwards from its outputs without passing its inputs; the others run in the reference kernels, which are right
and slow.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeopt.coverage import PRODUCT_TYPES, Coverage, Left
from edgeopt_converters.litert_graph import operators as list_operators
from edgeopt_wire.errors import RuntimeFailure

_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")
_DELEGATE = "DELEGATE"


def read(file: Path) -> Coverage:
    """Load `file` on the CPU and read what became of it.

    Raises:
        RuntimeFailure: LiteRT cannot load it.
    """
    details = _details(file)
    macs = {index: operator.macs for index, operator in enumerate(list_operators(file.read_bytes()))}
    steps = [entry for entry in details if entry["op_name"] not in (*_CONVERSIONS, _DELEGATE)]
    products = [entry for entry in steps if entry["op_name"] in PRODUCT_TYPES]
    inside = _delegated(details)
    return Coverage(
        runtime="litert",
        operators=len(steps),
        integer_operators=sum(_kind(entry) == "integer" for entry in steps),
        products=len(products),
        integer_products=sum(_kind(entry) == "integer" for entry in products),
        macs=sum(macs.get(entry["index"], 0) for entry in products),
        integer_macs=sum(macs.get(entry["index"], 0) for entry in products if _kind(entry) == "integer"),
        conversions=sum(entry["op_name"] in _CONVERSIONS for entry in details),
        dynamic=sum(_kind(entry) == "dynamic" for entry in steps),
        left_out=tuple(_left(entry, macs) for entry in steps if _kind(entry) != "integer"),
        outside=tuple(
            f"{entry['op_name']}_{entry['index']}" for entry in steps if entry["index"] not in inside
        ),
    )


def _details(file: Path) -> list[dict[str, Any]]:
    from ai_edge_litert.interpreter import Interpreter

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            interpreter = Interpreter(model_path=str(file), num_threads=1)
            interpreter.allocate_tensors()
            found: list[dict[str, Any]] = interpreter._get_ops_details()  # noqa: SLF001 - nothing public tells it
    except (ValueError, RuntimeError) as error:
        raise RuntimeFailure(f"litert cannot load {file.name}: {error}") from error
    return found


def _kind(entry: Mapping[str, Any]) -> str:
    operands = [kind.__name__ for kind in entry["operand_types"]]
    results = [kind.__name__ for kind in entry["result_types"]]
    if not any(name.startswith("float") for name in results):
        return "integer"
    return "dynamic" if "int8" in operands and entry["op_name"] in PRODUCT_TYPES else "float"


def _left(entry: Mapping[str, Any], macs: Mapping[int, int]) -> Left:
    name = f"{entry['op_name']}_{entry['index']}"
    if _kind(entry) == "dynamic":
        why = "its weights are int8 and its activations float: they are quantized anew in every inference"
        remedy = "calibrate, so that activations are int8 as well"
    else:
        why = "its tensors are float"
        remedy = "the quantizer left it out: exclude nothing, or use an operator that LiteRT has in int8"
    return Left(name, entry["op_name"], macs.get(entry["index"], 0), why, remedy)


def _delegated(details: Sequence[Mapping[str, Any]]) -> set[int]:
    """The operators that delegates took, found by walking back from their outputs."""
    makers = {
        int(name): entry for entry in details if entry["op_name"] != _DELEGATE for name in entry["outputs"]
    }
    found: set[int] = set()
    for delegate in (entry for entry in details if entry["op_name"] == _DELEGATE):
        edge = {int(name) for name in delegate["inputs"]}
        waiting = [int(name) for name in delegate["outputs"]]
        while waiting:
            maker = makers.get(waiting.pop())
            if maker is not None and maker["index"] not in found:
                found.add(maker["index"])
                waiting.extend(int(name) for name in maker["inputs"] if int(name) not in edge)
    return found
