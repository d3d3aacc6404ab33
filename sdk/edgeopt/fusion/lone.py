# SPDX-License-Identifier: Apache-2.0
"""A batch normalization that no layer can take becomes a layer that runtimes have in integers.

With spatial axes it is a depthwise convolution of one weight a channel; with two axes a product and a sum. A batch
normalization itself has no integer kernel in ONNX Runtime, so that the tensors around it went to floats and back.
"""

from __future__ import annotations

from typing import Any

from edgeopt.fusion.affine import read_batchnorm
from edgeopt.fusion.editing import Editor


def into_layer(editor: Editor, node: Any) -> str:
    """Write a lone batch normalization as a depthwise convolution, or as Mul and Add where there is nothing to slide over."""
    import numpy as np
    import onnx

    found = read_batchnorm(editor, node)
    rank = editor.rank(node.input[0]) if found is not None else None
    largest = np.finfo(np.float32).max
    if found is None or rank is None or rank < 2:
        return ""
    if not (np.abs([found.scale, found.shift]) < largest).all():
        return ""
    name, target = node.name or node.output[0], str(node.output[0])
    if found.moments is not None:
        editor.statistics[target] = found.moments
    if rank > 2:
        weight = editor.put(found.scale.reshape(-1, 1, *[1] * (rank - 2)), f"{name}_weight")
        bias = editor.put(found.shift, f"{name}_bias")
        kernel = [1] * (rank - 2)
        editor.become(node, "Conv", [found.source, weight, bias], group=len(found.scale), kernel_shape=kernel)
        return "batch normalizations into depthwise convolutions of their own"
    scale, shift = editor.put(found.scale, f"{name}_scale"), editor.put(found.shift, f"{name}_shift")
    editor.become(node, "Mul", [found.source, scale])
    editor.change(node, list(node.input), [f"{target}_scaled"])
    editor.add(
        onnx.helper.make_node("Add", [f"{target}_scaled", shift], [target], f"{name}_add"), behind=node
    )
    return "batch normalizations into a product and a sum"


RULES = (into_layer,)


def left(editor: Editor) -> tuple[str, ...]:
    """Say which batch normalizations in evaluation mode stayed."""
    names = [n.name or n.output[0] for n in editor.nodes() if read_batchnorm(editor, n) is not None]
    if not names:
        return ()
    said = (
        f"{len(names)} batch normalizations stay ({', '.join(names[:3])}): the shape of what they read is not known, "
        "or their factors exceed float32; fix the input shapes in the recipe ([[inputs]])"
    )
    return (said,)
