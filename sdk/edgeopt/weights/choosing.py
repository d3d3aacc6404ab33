# SPDX-License-Identifier: Apache-2.0
"""Which weights of a program are quantized, and how: products in groups or stored, tables, recurrent nets."""

from __future__ import annotations

from typing import Any

from edgeopt.weights import lowering, mse, rtn
from edgeopt.weights.grid import BITS, Grid
from edgeopt.weights.work import Product, Work, attribute, elements, label

PRODUCTS = ("Gemm", "MatMul")
SMALL_HEAD = 0.02
"""A product that makes an output of the model, of at most this share of all products' weights, keeps 8 bits: nothing
after it evens its error out. 10 classes of a small transformer, 0.1 % of it, were worth 5 dB."""


def choose(work: Work) -> None:
    """Find the products whose weights are put in groups, and lower tables and recurrent nets."""
    heads = _small_heads(work) if work.options.bits == min(BITS) and work.options.store_rest else frozenset()
    for node in work.nodes():
        if lowering.key(node) in heads:
            continue
        if node.op_type in PRODUCTS and len(node.input) > 1 and node.input[1] in work.constants:
            reason = _why_not(work, node)
            if reason == "" or (reason == NARROW and _is_storable(work, node)):
                is_rows = attribute(node, "transB", 0) == 1
                key = (node.input[1], is_rows)
                work.products.setdefault(key, Product(*key, reason == NARROW)).nodes.append(node)
            elif reason != NARROW:
                work.left.append(f"{label(node)} ({reason})")
        elif node.op_type == "Gather" and (grid := _table_grid(work, node)) is not None:
            rounding = mse if grid.bits == min(BITS) else rtn  # at 8 bits clipping gains next to nothing
            work.lowered[node.output[0]] = lowering.table(
                node, rounding.quantize(work.array(node.input[0]), grid)
            )
        elif node.op_type == "LSTM" and _is_plain_lstm(work, node):
            weights = (work.array(node.input[1]), work.array(node.input[2]))
            work.lowered[lowering.key(node)] = lowering.recurrent(node, *weights)
    tables = [node for node in work.nodes() if node.op_type == "Gather" and node.output[0] in work.lowered]
    recurrent = [
        node for node in work.nodes() if node.op_type == "LSTM" and lowering.key(node) in work.lowered
    ]
    if tables:
        work.notes.append(f"{len(tables)} tables in {work.options.embedding_bits or work.options.bits} bits")
    if recurrent:
        work.notes.append(f"{len(recurrent)} LSTM in int8, a scale for each gate of each unit")


def _small_heads(work: Work) -> frozenset[str]:
    """The outputs of small products whose result, or what a bias makes of it, is an output of the model."""
    outputs = {entry.name for entry in work.program.graph.output}
    outputs |= {
        name
        for node in work.nodes()
        if node.op_type == "Add" and set(node.output) & outputs
        for name in node.input
    }
    products = [
        (lowering.key(node), elements(work.constants[node.input[1]]))
        for node in work.nodes()
        if node.op_type in PRODUCTS and node.input[1] in work.constants
    ]
    limit = SMALL_HEAD * sum(size for _, size in products)
    return frozenset(name for name, size in products if name in outputs and size <= limit)


NARROW = "narrow"


def _why_not(work: Work, node: Any) -> str:
    """Why a product's weight is not put in groups, or nothing."""
    import onnx

    tensor = work.constants[node.input[1]]
    if node.name in work.exclude or node.op_type in work.exclude:
        return "excluded by the recipe"
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return "not float32"
    plain = all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if len(tensor.dims) != 2 or attribute(node, "transA", 0) or not plain:
        return "not a plain matrix product"
    if len(node.input) > 2 and node.input[2] and not _is_bias(work, node):
        return "its bias is no constant vector"
    inputs = tensor.dims[1] if attribute(node, "transB", 0) else tensor.dims[0]
    if inputs < work.options.skip_k_below:
        return NARROW
    return ""


def _is_storable(work: Work, node: Any) -> bool:
    """Whether a narrow product's weight can be stored in 4 bits in whole groups; in 8 bits it is per channel anyway."""
    tensor = work.constants[node.input[1]]
    inputs = tensor.dims[1] if attribute(node, "transB", 0) else tensor.dims[0]
    options = work.options
    is_large = elements(tensor) >= options.smallest
    return options.store_rest and options.bits == min(BITS) and is_large and inputs % options.group == 0


def _is_bias(work: Work, node: Any) -> bool:
    bias, weight = work.constants.get(node.input[2]), work.constants[node.input[1]]
    outputs = weight.dims[0] if attribute(node, "transB", 0) else weight.dims[1]
    return bias is not None and list(bias.dims) == [outputs]


def _table_grid(work: Work, node: Any) -> Grid | None:
    """The grid of a table of rows that a Gather chooses from; None for what is no such table, or stays in float."""
    tensor = work.constants.get(node.input[0])
    if tensor is None or tensor.data_type != 1 or len(tensor.dims) != 2 or attribute(node, "axis", 0) != 0:
        return None
    is_excluded = {node.name, node.op_type} & set(work.exclude)
    if is_excluded or elements(tensor) < work.options.smallest:
        return None
    return work.options.table_grid(tensor.dims[1])


def _is_plain_lstm(work: Work, node: Any) -> bool:
    """What DynamicQuantizeLSTM takes: constant weights, time first, no excluding word of the recipe."""
    known = all(name in work.constants and work.constants[name].data_type == 1 for name in node.input[1:3])
    return (
        known
        and attribute(node, "layout", 0) == 0
        and node.name not in work.exclude
        and node.op_type not in work.exclude
    )
