# SPDX-License-Identifier: Apache-2.0
"""A cut-out operator that can be looked at and changed: who makes and reads its tensors, and what is quantized how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeopt.coverage._cuts import DEQUANTIZE, QUANTIZE, TARGET

if TYPE_CHECKING:
    import numpy as np

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
BIASED = ("Conv", "ConvTranspose", "Gemm")
_SCALE = 0.05


class Patient:
    """A cut under repair: a model of its own, and the operator that it is about."""

    def __init__(self, model: Any) -> None:
        import onnx

        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        self.node = next(node for node in self.graph.node if node.name == TARGET)

    def constant(self, name: str) -> Any:
        """An initializer's TensorProto, or None."""
        return next((tensor for tensor in self.graph.initializer if tensor.name == name), None)

    def writer(self, name: str) -> Any:
        """Who makes a tensor, or None."""
        return next((node for node in self.graph.node if name in node.output), None)

    def readers(self, name: str) -> list[Any]:
        """Who reads a tensor."""
        return [node for node in self.graph.node if name in node.input]

    def is_shown(self, name: str) -> bool:
        """Whether a tensor leaves the cut."""
        return any(value.name == name for value in self.graph.output)

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is a constant or made of constants alone."""
        writer = self.writer(name)
        if writer is None:
            return self.constant(name) is not None
        return all(not entry or self.is_constant(entry) for entry in writer.input)

    def dequantizer(self, name: str) -> Any:
        """The DequantizeLinear that makes a tensor, or None."""
        writer = self.writer(name)
        return writer if writer is not None and writer.op_type == DEQUANTIZE else None

    def quantizers(self) -> list[Any]:
        """The QuantizeLinear behind the operator, through one activation between."""
        found: list[Any] = []
        for reader in self.readers(self.node.output[0]):
            if reader.op_type == QUANTIZE:
                found.append(reader)
            elif reader.op_type in ("Relu", "Clip"):
                found += [node for node in self.readers(reader.output[0]) if node.op_type == QUANTIZE]
        return found

    def data(self) -> list[str]:
        """The tensors that the operator computes with and that are no constants."""
        return [name for name in self.node.input if name and not self.is_constant(name)]

    def data_dequantizers(self) -> list[Any]:
        """The DequantizeLinear of those tensors, as far as they have one."""
        found = (self.dequantizer(name) for name in self.data())
        return [node for node in found if node is not None]

    def weights(self) -> str:
        """The weights of the operator, or nothing."""
        names = self.node.input[1:2] if self.node.op_type in WEIGHTED else []
        return next((name for name in names if self.is_constant(name)), "")

    def weight_dequantizer(self) -> Any:
        """The DequantizeLinear of its weights, or None."""
        name = self.weights()
        return self.dequantizer(name) if name else None

    def add_constant(self, values: np.ndarray) -> str:
        """Put a constant into the cut and give its name."""
        import onnx

        name = f"repair_{len(self.graph.initializer)}"
        self.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        return name

    def add_pair(self, source: str, end: str) -> None:
        """Stand a QuantizeLinear and a DequantizeLinear (uint8) between two tensors."""
        import numpy as np
        import onnx

        scale = self.add_constant(np.asarray(_SCALE, np.float32))
        zero = self.add_constant(np.asarray(128, np.uint8))
        pair = [
            onnx.helper.make_node(QUANTIZE, [source, scale, zero], [f"{scale}_q"], f"{scale}_quantize"),
            onnx.helper.make_node(DEQUANTIZE, [f"{scale}_q", scale, zero], [end], f"{scale}_dequantize"),
        ]
        self.graph.node.extend(pair)

    def dtype(self, node: Any) -> str:
        """The integers of a QuantizeLinear or DequantizeLinear, e.g. "int8"."""
        import onnx

        zero = self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        source = zero if zero is not None else self.constant(node.input[0])
        if source is not None:
            return str(onnx.helper.tensor_dtype_to_np_dtype(source.data_type).name)
        output = next((entry.i for entry in node.attribute if entry.name == "output_dtype"), 0)
        return str(onnx.helper.tensor_dtype_to_np_dtype(output).name) if output else "uint8"

    def is_per_channel(self, node: Any) -> bool:
        """Whether a QuantizeLinear or DequantizeLinear has more than one scale."""
        from math import prod

        scale = self.constant(node.input[1])
        return scale is not None and prod(scale.dims) > 1

    def merge_channels(self, nodes: list[Any]) -> None:
        """Give the integers of QuantizeLinear and DequantizeLinear nodes their largest scale, wherever they are read."""
        import numpy as np

        names = {node.output[0] if node.op_type == QUANTIZE else node.input[0] for node in nodes}
        for node in self._around(names):
            zero = self._zero(node).reshape(-1)[0].astype(self.dtype(node))
            node.input[1] = self.add_constant(np.asarray(self._scale(node).max(), np.float32))
            self._set_zero(node, np.asarray(zero))

    def _around(self, names: set[str]) -> list[Any]:
        """The QuantizeLinear that make, and the DequantizeLinear that read, these tensors."""
        return [
            node
            for node in self.graph.node
            if (node.op_type == QUANTIZE and node.output[0] in names)
            or (node.op_type == DEQUANTIZE and node.input[0] in names)
        ]

    def change_activations(self, nodes: list[Any], dtype: str) -> None:
        """Let QuantizeLinear and DequantizeLinear nodes be of another type, and all others of the same integers.

        Their ranges stay: what is absorbed by the rounding because of its ends still is.
        """
        import numpy as np

        names = {node.output[0] if node.op_type == QUANTIZE else node.input[0] for node in nodes}
        names = {name for name in names if not self.is_constant(name)}
        for node in self._around(names):
            before, after = np.iinfo(self.dtype(node)), np.iinfo(dtype)
            ratio = (before.max - before.min) / (after.max - after.min)
            zero = after.min + np.round((self._zero(node) - before.min) / ratio)
            if ratio != 1:
                node.input[1] = self.add_constant((self._scale(node) * ratio).astype(np.float32))
            self._set_zero(node, zero.astype(dtype))
        for value in self.graph.input:
            if value.name in names:
                value.type.tensor_type.elem_type = _element(dtype)

    def _zero(self, node: Any) -> np.ndarray:
        """The zero point of a QuantizeLinear or DequantizeLinear; 0 where it has none or computes it."""
        import numpy as np
        import onnx

        found = self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        return np.asarray(onnx.numpy_helper.to_array(found) if found is not None else 0, np.int64)

    def _scale(self, node: Any) -> np.ndarray:
        import numpy as np
        import onnx

        found = self.constant(node.input[1])
        return np.asarray(onnx.numpy_helper.to_array(found) if found is not None else _SCALE)

    def _set_zero(self, node: Any, zero: np.ndarray) -> None:
        inputs = list(node.input)[:2]
        for entry in [entry for entry in node.attribute if entry.name == "output_dtype"]:
            node.attribute.remove(entry)
        node.ClearField("input")
        node.input.extend([*inputs, self.add_constant(zero)])

    def set_weights(self, *, like: np.ndarray | None = None) -> None:
        """Give the operator int8 weights per tensor of the shape of `like`, or of those it has."""
        import numpy as np
        import onnx

        shape = (
            like.shape if like is not None else tuple(self.constant(self.weight_dequantizer().input[0]).dims)
        )
        values = self.add_constant(np.ones(shape, np.int8))
        scale = self.add_constant(np.asarray(_SCALE, np.float32))
        zero = self.add_constant(np.asarray(0, np.int8))
        name = f"{values}_dq"
        self.graph.node.append(
            onnx.helper.make_node(DEQUANTIZE, [values, scale, zero], [name], f"{values}_dequantize")
        )
        self.node.input[1] = name

    def set_bias(self) -> bool:
        """Give the operator an int32 bias with the scale that it should have; none where its scales are not known.

        False if it has such a bias, or an integer one whose scale cannot be judged.
        """
        import numpy as np
        import onnx

        scales = [
            self.constant(node.input[1])
            for node in (*self.data_dequantizers()[:1], self.weight_dequantizer())
            if node
        ]
        name, kept = self.node.input[2], list(self.node.input[:2])
        known = self.dequantizer(name)
        if len(scales) != 2 or None in scales:
            if known is None:
                del self.node.input[2]
            return known is None
        first, second = (onnx.numpy_helper.to_array(scale) for scale in scales)
        wanted = np.asarray(first * second, np.float32)
        found = self.constant(known.input[1]) if known is not None else None
        if found is not None and self.dtype(known) == "int32":
            scale = onnx.numpy_helper.to_array(found)
            if scale.size == wanted.size and np.allclose(scale.ravel(), wanted.ravel(), rtol=1e-3):
                return False
        size = self._bias_size(name)
        values = self.add_constant(np.zeros(size, np.int32))
        inputs = [values, self.add_constant(wanted.ravel() if wanted.size > 1 else wanted.reshape(()))]
        end = f"{values}_dq"
        self.graph.node.append(
            onnx.helper.make_node(DEQUANTIZE, inputs, [end], f"{values}_dequantize", axis=0)
        )
        self.node.ClearField("input")
        self.node.input.extend([*kept, end])
        return True

    def _bias_size(self, name: str) -> int:
        from math import prod

        known = self.dequantizer(name)
        tensor = self.constant(known.input[0] if known is not None else name)
        return prod(tensor.dims) if tensor is not None else 1


def _element(dtype: str) -> int:
    import numpy as np
    import onnx

    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
