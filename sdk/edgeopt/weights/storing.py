# SPDX-License-Identifier: Apache-2.0
"""Weights that take part in no integer product, in fewer bits in the file and float again when it is loaded."""

from __future__ import annotations

from typing import Any

from edgeopt.weights import lowering
from edgeopt.weights.choosing import PRODUCTS
from edgeopt.weights.grid import BITS
from edgeopt.weights.work import Work, attribute, elements, label

STORED = ("Conv", "ConvTranspose", "LSTM", *PRODUCTS)


def store(work: Work) -> None:
    """Keep in int8 what is not in groups: convolutions, narrow products, recurrent nets that are not plain."""
    stored = []
    for node in work.nodes():
        if node.op_type not in STORED or lowering.key(node) in work.lowered:
            continue
        for name in node.input[1 : 3 if node.op_type == "LSTM" else 2]:
            tensor = work.constants.get(name)
            if tensor is None or tensor.data_type != 1 or name in work.lowered:
                continue
            if not work.options.store_rest or {node.name, node.op_type} & set(work.exclude):
                work.left.append(f"{label(node)} (excluded by the recipe)")
            elif len(tensor.dims) >= 2 and elements(tensor) >= work.options.smallest:
                work.lowered[name] = lowering.stored(
                    name, work.array(name), _channels(node, len(tensor.dims))
                )
                stored.append(name)
    if stored:
        work.notes.append(
            f"{len(stored)} weights stored in int8 per channel and unpacked at loading; they run in float"
        )
    if work.options.store_rest and work.options.bits == min(BITS):
        _halve(work)


def _halve(work: Work) -> None:
    """Keep other large constants in half precision: positions of tokens were a twenty-fifth of a small transformer."""
    staying = [node for node in work.nodes() if lowering.key(node) not in work.lowered]
    excluded = [node for node in staying if {node.name, node.op_type} & set(work.exclude)]
    read = {name for node in staying for name in node.input} - {
        name for node in excluded for name in node.input
    }
    halved = []
    for name, tensor in work.constants.items():
        is_large = tensor.data_type == 1 and elements(tensor) >= work.options.smallest
        if name in read and is_large and name not in work.lowered:
            found = lowering.halved(name, work.array(name))
            if found is not None:
                work.lowered[name] = found
                halved.append(name)
    if halved:
        work.notes.append(f"{len(halved)} other constants stored in half precision: {', '.join(halved)}")


def _channels(node: Any, axes: int) -> tuple[int, ...]:
    """The axes of a weight that have a scale of their own."""
    if node.op_type == "LSTM":
        return (0, 1)
    if node.op_type == "ConvTranspose":
        return (1,) if attribute(node, "group", 1) == 1 else (0, 1)
    if node.op_type == "Conv" or attribute(node, "transB", 0):
        return (0,)
    return (axes - 1,)
