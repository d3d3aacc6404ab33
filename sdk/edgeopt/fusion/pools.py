# SPDX-License-Identifier: Apache-2.0
"""A mean over height and width is global average pooling; runtimes pool in integers only what is called pooling."""

from __future__ import annotations

from typing import Any

from edgeopt.fusion.editing import Editor
from edgeopt.onnx_products import attributes


def global_mean(editor: Editor, node: Any) -> str:
    """Write ReduceMean over the two last of four axes as GlobalAveragePool, and Flatten where the axes vanish."""
    import onnx

    if node.op_type != "ReduceMean" or node.domain or editor.rank(node.input[0]) != 4:
        return ""
    given = attributes(node)
    axes = list(given.get("axes", ()))
    if len(node.input) > 1 and node.input[1]:
        found = editor.constant(node.input[1])
        axes = [] if found is None else found.reshape(-1).tolist()
    if sorted(axis % 4 for axis in axes) != [2, 3]:
        return ""
    target = str(node.output[0])
    editor.become(node, "GlobalAveragePool", [node.input[0]])
    if not given.get("keepdims", 1):
        editor.change(node, list(node.input), [f"{target}_pooled"])
        name = f"{node.name or target}_flatten"
        flatten = onnx.helper.make_node("Flatten", [f"{target}_pooled"], [target], name)
        editor.add(flatten, behind=node)
    return "means into global average pools"


RULES = (global_mean,)
