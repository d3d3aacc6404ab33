# SPDX-License-Identifier: Apache-2.0
"""A factor and a shift per channel (batch normalization, or Mul, Add, Sub, Div by constants) go into the layer beside them.

Behind a layer: y = s * (W x + b) + t is a layer with weights s * W and bias s * b + t. Before one: W (s * x + t) + b has
weights W * s and bias b + W t, which a convolution with padding cannot have, because zeros are padded, not t.
Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3.2 (batch normalization folding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.fusion.editing import Editor
from edgeopt.fusion.moments import Moments
from edgeopt.fusion.training import is_training
from edgeopt.onnx_products import attributes

if TYPE_CHECKING:
    import numpy as np

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_EPSILON = 1e-5  # of BatchNormalization where it names none


@dataclass(frozen=True, eq=False)
class Affine:
    """scale * x + shift, channel by channel, both of shape (channels,) in float64; `source` is x."""

    scale: np.ndarray
    shift: np.ndarray
    source: str
    moments: Moments | None = None


def read_batchnorm(editor: Editor, node: Any) -> Affine | None:
    """A batch normalization in evaluation mode as factor and shift, with what it promises of its output."""
    import numpy as np

    if node.op_type != "BatchNormalization" or node.domain or is_training(editor, node):
        return None
    gamma, beta, mean, variance = (editor.weight(name) for name in list(node.input)[1:5])
    if gamma is None or beta is None or mean is None or variance is None:
        return None
    scale = gamma / np.sqrt(variance + float(attributes(node).get("epsilon", _EPSILON)))
    shift = beta - mean * scale
    return Affine(scale, shift, str(node.input[0]), Moments(beta, np.abs(gamma)))


def after(editor: Editor, node: Any) -> str:
    """Fold what stands behind a layer, and is its only reader, into it."""
    if not node.output or node.domain:
        return ""
    for name in node.input[:2]:
        layer = editor.writer(name)
        if layer is None or layer.op_type not in LAYERS or layer.domain or not editor.is_private(name):
            continue
        found = read_batchnorm(editor, node) or _arithmetic(editor, node, layer)
        if found is not None and found.source == name and _into(editor, layer, found, node):
            what = (
                "batch normalizations"
                if node.op_type == "BatchNormalization"
                else "constant factors and shifts"
            )
            return f"{what} into the layer before"
    return ""


def before(editor: Editor, node: Any) -> str:
    """Fold a batch normalization into the convolution or Gemm that alone reads it, where no padding lies between."""
    found = read_batchnorm(editor, node)
    if found is None or not editor.is_private(node.output[0]):
        return ""
    layer = editor.readers(node.output[0])[0]
    if layer.input[0] != node.output[0] or not _takes_input(editor, layer, found):
        return ""
    weight, bias = editor.weight(layer.input[1]), _bias(editor, layer)
    if weight is None or bias is None:
        return ""
    scale, shift = _along_inputs(layer, weight, found.scale), _along_inputs(layer, weight, found.shift)
    axes = tuple(axis for axis in range(weight.ndim) if axis != _output_axis(layer))
    moved = bias + float(attributes(layer).get("alpha", 1.0)) * (weight * shift).sum(axis=axes)
    if not _write(editor, layer, weight * scale, moved):
        return ""
    editor.change(layer, [found.source, *layer.input[1:]])
    editor.remove(node)
    return "batch normalizations into the layer behind"


RULES = (after, before)


def _arithmetic(editor: Editor, node: Any, layer: Any) -> Affine | None:
    """Mul, Add, Sub or Div of a layer's output and constants that are alike in all but its channels."""
    import numpy as np

    if node.op_type not in ("Mul", "Add", "Sub", "Div") or len(node.input) != 2:
        return None
    weight = editor.weight(layer.input[1])
    place = next((k for k in (0, 1) if editor.weight(node.input[k]) is not None), None)
    if weight is None or place is None:
        return None
    channels = _channels(layer, weight)
    values = _per_channel(editor.weight(node.input[place]), layer, weight.ndim, channels)
    if values is None or (node.op_type == "Div" and (place == 0 or not values.all())):
        return None
    ones, none = np.ones(channels), np.zeros(channels)
    scale, shift = {
        "Mul": (values, none),
        "Add": (ones, values),
        "Sub": (ones, -values) if place == 1 else (-ones, values),
        "Div": (1.0 / np.where(values == 0, 1.0, values), none),
    }[node.op_type]
    return Affine(scale, shift, str(node.input[1 - place]))


def _per_channel(values: np.ndarray | None, layer: Any, rank: int, channels: int) -> np.ndarray | None:
    """Constants as one value a channel, or None where they differ elsewhere or would widen the output."""
    import numpy as np

    if values is None:
        return None
    if layer.op_type in ("Conv", "ConvTranspose"):
        if values.ndim > rank:
            return None
        aligned = values.reshape((1,) * (rank - values.ndim) + values.shape)
        others = aligned.shape[:1] + aligned.shape[2:]
        own = aligned.shape[1]
    else:
        if values.ndim > (2 if layer.op_type == "Gemm" else 1):
            return None
        others, own = values.shape[:-1], values.shape[-1] if values.ndim else 1
    if any(size != 1 for size in others) or own not in (1, channels):
        return None
    return np.broadcast_to(values.reshape(-1), (channels,)).astype(np.float64)


def _into(editor: Editor, layer: Any, found: Affine, node: Any) -> bool:
    weight, bias = editor.weight(layer.input[1]), _bias(editor, layer)
    if weight is None or bias is None or len(found.scale) != _channels(layer, weight):
        return False
    if layer.op_type == "MatMul" and (weight.ndim != 2 or (found.moments or found.shift.any())):
        return _as_gemm(editor, layer, found, node)
    moved = found.scale * bias + found.shift
    needs_bias = bool(moved.any()) or len(layer.input) > 2
    if not _write(
        editor, layer, weight * _along_outputs(layer, weight, found.scale), moved if needs_bias else None
    ):
        return False
    _take_over(editor, layer, found, node)
    return True


def _take_over(editor: Editor, layer: Any, found: Affine, node: Any) -> None:
    """The layer writes what `node` wrote."""
    old = editor.statistics.pop(layer.output[0], None)
    target = str(node.output[0])
    editor.remove(node)
    editor.change(layer, list(layer.input), [target])
    if found.moments is not None:
        editor.statistics[target] = found.moments
    elif old is not None:
        editor.statistics[target] = old.scaled(found.scale, found.shift)


def _as_gemm(editor: Editor, layer: Any, found: Affine, node: Any) -> bool:
    """A product of matrices has no bias; Gemm has one, for two axes. An Add behind MatMul is left to the runtimes."""
    weight = editor.weight(layer.input[1])
    if weight is None or weight.ndim != 2 or editor.rank(layer.input[0]) != 2 or found.moments is None:
        return False
    editor.become(layer, "Gemm", list(layer.input))
    return _into(editor, layer, found, node)


def _takes_input(editor: Editor, layer: Any, found: Affine) -> bool:
    """Whether a factor and a shift of its input can enter a layer."""
    weight = editor.weight(layer.input[1]) if layer.op_type in ("Conv", "Gemm") and not layer.domain else None
    if weight is None:
        return False
    given = attributes(layer)
    if layer.op_type == "Gemm":
        return not given.get("transA", 0) and weight.shape[1 if given.get("transB", 0) else 0] == len(
            found.scale
        )
    is_padded = any(given.get("pads", ())) or given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    return not (is_padded and found.shift.any()) and weight.shape[1] * given.get("group", 1) == len(
        found.scale
    )


def _channels(layer: Any, weight: np.ndarray) -> int:
    if layer.op_type == "ConvTranspose":
        return int(weight.shape[1] * attributes(layer).get("group", 1))
    return int(weight.shape[_output_axis(layer)])


def _output_axis(layer: Any) -> int:
    if layer.op_type == "Conv":
        return 0
    if layer.op_type == "Gemm":
        return 0 if attributes(layer).get("transB", 0) else 1
    return 1  # MatMul (inputs, outputs)


def _along_outputs(layer: Any, weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values per output channel in the shape that multiplies the weights.

    A transposed convolution has its outputs on axis 1, group by group along axis 0.
    """
    import numpy as np

    if layer.op_type == "ConvTranspose":
        groups = attributes(layer).get("group", 1)
        rows = np.repeat(values.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        return rows.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    shape = [1] * weight.ndim
    shape[_output_axis(layer)] = -1
    return values.reshape(shape)


def _along_inputs(layer: Any, weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values per input channel in the shape that multiplies the weights."""
    import numpy as np

    if layer.op_type == "Gemm":
        return values.reshape(1, -1) if _output_axis(layer) == 0 else values.reshape(-1, 1)
    groups = attributes(layer).get("group", 1)
    rows = np.repeat(values.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    return rows.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))


def _bias(editor: Editor, layer: Any) -> np.ndarray | None:
    """The bias per output channel, zeros where the layer has none, None where it is not constant or not per channel."""
    import numpy as np

    weight = editor.weight(layer.input[1])
    if weight is None:
        return None
    channels = _channels(layer, weight)
    if len(layer.input) < 3 or not layer.input[2]:
        return np.zeros(channels)
    values = editor.weight(layer.input[2])
    if values is None or values.size not in (1, channels) or values.shape[-1:] not in ((), (1,), (channels,)):
        return None
    beta = float(attributes(layer).get("beta", 1.0)) if layer.op_type == "Gemm" else 1.0
    return np.broadcast_to(values.reshape(-1) * beta, (channels,))


def _write(editor: Editor, layer: Any, weight: np.ndarray, bias: np.ndarray | None) -> bool:
    """Give a layer new weights and a bias; refuse what float32 cannot hold."""
    import numpy as np

    largest = np.finfo(np.float32).max
    if not (np.abs(weight) < largest).all() or (bias is not None and not (np.abs(bias) < largest).all()):
        return False
    inputs = [layer.input[0], editor.replace(layer, 1, weight)]
    if bias is not None:
        given = len(layer.input) > 2 and bool(layer.input[2])
        name = layer.name or layer.output[0]
        inputs.append(editor.replace(layer, 2, bias) if given else editor.put(bias, f"{name}_bias"))
        kept = [entry for entry in layer.attribute if entry.name != "beta"]
        del layer.attribute[:]
        layer.attribute.extend(kept)
    editor.change(layer, inputs)
    return True
