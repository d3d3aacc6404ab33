# SPDX-License-Identifier: Apache-2.0
"""Batch normalization and dropout that were exported in training mode: said, or settled where that is asked for."""

from __future__ import annotations

from collections import Counter
from typing import Any

from edgeopt.fusion.editing import Editor
from edgeopt.onnx_products import attributes


def settle(editor: Editor, counts: Counter[str], *, running_statistics: bool) -> tuple[str, ...]:
    """Take training mode away where `running_statistics` says so; else return a sentence about what has it."""
    found = [node for node in editor.nodes() if is_training(editor, node)]
    if not found:
        return ()
    if not running_statistics:
        names = ", ".join(sorted(node.name or node.output[0] for node in found)[:3])
        said = (
            f"{len(found)} operators ({names}) are in training mode: they use each batch's own statistics or drop at "
            "random, and stay as they are; export the model after model.eval(), or set running_statistics = true "
            "under [passes.fuse_operators]"
        )
        return (said,)
    for node in found:
        if node.op_type == "Dropout":
            editor.change(node, [node.input[0]], [node.output[0]])
        else:
            kept = [entry for entry in node.attribute if entry.name != "training_mode"]
            del node.attribute[:]
            node.attribute.extend(kept)
            editor.change(node, list(node.input), [node.output[0]])
        counts[f"{node.op_type} in training mode taken as in evaluation mode"] += 1
    return ()


def is_training(editor: Editor, node: Any) -> bool:
    """Whether a node behaves as in training: a flag, an input, or (before opset 14) outputs that only training has."""
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "BatchNormalization":
        if editor.opset >= 14:
            return bool(attributes(node).get("training_mode", 0))
        return len([name for name in node.output if name]) > 1
    if node.op_type != "Dropout" or len(node.input) < 3 or not node.input[2]:
        return False
    flag = editor.constant(node.input[2])
    return flag is None or bool(flag)
