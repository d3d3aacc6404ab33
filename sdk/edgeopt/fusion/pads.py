# SPDX-License-Identifier: Apache-2.0
"""A Pad of zeros goes into the convolution or pool that reads it, which pads by itself at no cost.

A convolution always pads zeros. An average pool counts explicit zeros, so it must count its own too
(`count_include_pad`); a max pool ignores its own padding, which is the same only where nothing is below zero.
ceil_mode and dilated windows can read past the padding in ways that differ, and stay.
Source: ONNX operators Pad-18, Conv-11, AveragePool-11, MaxPool-12 (semantics of padding).
"""

from __future__ import annotations

from typing import Any

from edgeopt.fusion.editing import Editor
from edgeopt.onnx_products import attributes

_POOLS = ("AveragePool", "MaxPool")
_NEVER_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Exp", "Abs", "Sqrt"})
_KEEP_SIGN = frozenset(
    {"MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Flatten", "Transpose", "Concat"}
)
_VALID = (b"NOTSET", b"VALID")


def into_reader(editor: Editor, node: Any) -> str:
    """Let every reader of a Pad pad by itself; readers that cannot keep the Pad."""
    found = _zeros(editor, node)
    if found is None or editor.is_output(node.output[0]):
        return ""
    taken = [reader for reader in editor.readers(node.output[0]) if _takes(editor, reader, node, found)]
    for reader in taken:
        _set_pads(reader, found, counts=reader.op_type == "AveragePool")
        editor.change(reader, [node.input[0], *reader.input[1:]])
    if not editor.readers(node.output[0]):
        editor.remove(node)
    return "pads into the operator behind" if taken else ""


RULES = (into_reader,)


def _zeros(editor: Editor, node: Any) -> tuple[list[int], list[int]] | None:
    """(begins, ends) on the axes behind the channels of a Pad that adds zeros there and nowhere else, or None."""
    if node.op_type != "Pad" or node.domain or len(node.input) < 2:
        return None
    if attributes(node).get("mode", b"constant") != b"constant":
        return None
    value = editor.scalar(node.input[2]) if len(node.input) > 2 and node.input[2] else 0.0
    given = editor.constant(node.input[1])
    if value != 0.0 or given is None:
        return None
    amounts = given.reshape(-1).tolist()
    rank = len(amounts) // 2
    axes = list(range(rank))
    if len(node.input) > 3 and node.input[3]:
        named, known = editor.constant(node.input[3]), editor.rank(node.input[0])
        if named is None or known is None:
            return None
        rank, axes = known, [axis % known for axis in named.tolist()]
    begins, ends = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        begins[axis], ends[axis] = amounts[place], amounts[place + len(axes)]
    if rank < 3 or any((*begins[:2], *ends[:2])) or min((*begins, *ends)) < 0:
        return None
    return begins[2:], ends[2:]


def _takes(editor: Editor, reader: Any, node: Any, found: tuple[list[int], list[int]]) -> bool:
    if reader.op_type not in ("Conv", *_POOLS) or reader.domain or reader.input[0] != node.output[0]:
        return False
    given = attributes(reader)
    if list(reader.input).count(node.output[0]) != 1 or given.get("auto_pad", b"NOTSET") not in _VALID:
        return False
    if reader.op_type == "Conv":
        return True
    kernel = given["kernel_shape"]
    own = given.get("pads", [0] * 2 * len(kernel))
    summed = [a + b for a, b in zip(own, (*found[0], *found[1]), strict=True)]
    is_odd = given.get("ceil_mode", 0) or any(step != 1 for step in given.get("dilations", ()))
    if is_odd or any(pad >= size for pad, size in zip(summed, (*kernel, *kernel), strict=True)):
        return False
    if reader.op_type == "AveragePool":
        return bool(given.get("count_include_pad", 0)) or not any(own)
    return len(reader.output) == 1 and _is_never_negative(editor, node.input[0])


def _is_never_negative(editor: Editor, name: str) -> bool:
    writer = editor.writer(name)
    if writer is None:
        values = editor.constant(name)
        return values is not None and bool((values >= 0).all())
    if writer.op_type in _KEEP_SIGN:
        sources = writer.input if writer.op_type == "Concat" else writer.input[:1]
        return all(_is_never_negative(editor, source) for source in sources)
    if writer.op_type == "Clip" and len(writer.input) > 1 and writer.input[1]:
        low = editor.scalar(writer.input[1])
        return low is not None and low >= 0
    return writer.op_type in _NEVER_NEGATIVE


def _set_pads(reader: Any, found: tuple[list[int], list[int]], *, counts: bool) -> None:
    import onnx

    amounts = [*found[0], *found[1]]
    own = attributes(reader).get("pads", [0] * len(amounts))
    wanted: dict[str, Any] = {"pads": [a + b for a, b in zip(own, amounts, strict=True)]}
    if counts:
        wanted["count_include_pad"] = 1
    kept = [entry for entry in reader.attribute if entry.name not in (*wanted, "auto_pad")]
    del reader.attribute[:]
    reader.attribute.extend(
        [*kept, *(onnx.helper.make_attribute(key, value) for key, value in wanted.items())]
    )
