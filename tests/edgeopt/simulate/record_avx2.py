# SPDX-License-Identifier: Apache-2.0
"""Small seeded QDQ models, and what ONNX Runtime's AVX2 kernels make of them: `avx2.npz` beside this file.

The file was recorded by ONNX Runtime 1.32.0 on an emulated CPU that has AVX2 and neither AVX-512 nor VNNI:

    qemu-x86_64-static -cpu Haswell-noTSX python tests/edgeopt/simulate/record_avx2.py FILE

(QEMU 7.2, Debian's qemu-user-static; a few seconds.) The AVX2 and AVX-512BW kernels gave the same file on a real CPU,
in copies of the library that do not look for newer instructions.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

RECORDED = Path(__file__).with_name("avx2.npz")
SEEDS = {"uint8": 11, "int8": 12}

# channels, outputs, kernel, groups, strides, pads: each reaches another kernel of ONNX Runtime
CONVS = {
    "stem": (3, 16, 3, 1, 2, 1),  # 3 channels: im2col and QGEMM, pairs across positions
    "pointwise": (24, 32, 1, 1, 1, 0),  # symmetric convolution on the input as it lies
    "symmetric": (16, 32, 3, 1, 1, 1),  # symmetric convolution with an indirection buffer
    "odd": (5, 7, 3, 1, 1, 1),  # odd K, so a last pair of one
    "groups": (12, 16, 3, 2, 1, 1),  # QGEMM for each group
    "multiplier": (8, 16, 3, 8, 1, 1),  # one channel in, two out: QGEMM over positions
    "depthwise": (32, 32, 3, 32, 1, 1),  # symmetric depthwise kernel
    "depthwise_odd": (10, 10, 3, 10, 1, 1),  # the other depthwise kernel
    "one_pixel": (32, 24, 1, 1, 1, 0),  # one row
}
MATRICES = {"matmul": (9, 33, 20), "gemm": (4, 50, 12), "gemm_row": (1, 64, 17), "matmul_row": (1, 40, 16)}


def conv_case(name: str, activation: str) -> tuple[Any, dict[str, np.ndarray]]:
    """One convolution between Q and DQ, weights full of large values of one sign, and a bright input."""
    channels, outputs, kernel, groups, stride, pad = CONVS[name]
    rng = np.random.default_rng([SEEDS[activation], list(CONVS).index(name)])
    size = 1 if name == "one_pixel" else 7
    weights = _weights(rng, (outputs, channels // groups, kernel, kernel))
    depth = weights[0].size
    graph = _Graph(activation, rng, depth)
    weight = graph.weight(weights, axis=0)
    bias = graph.bias(rng.integers(-2000, 2000, outputs), axis=0)
    node = helper.make_node(
        "Conv", ["x_real", weight, bias], ["sum"], name, group=groups, strides=[stride] * 2, pads=[pad] * 4
    )
    return graph.finish(node, (1, channels, size, size))


def matrix_case(name: str, activation: str, *, is_rounded: bool = True) -> tuple[Any, dict[str, np.ndarray]]:
    """One matrix product; its output is rounded to integers, or floats."""
    rows, depth, outputs = MATRICES[name]
    rng = np.random.default_rng([SEEDS[activation], 100 + list(MATRICES).index(name)])
    weights = _weights(rng, (outputs, depth))
    graph = _Graph(activation, rng, depth)
    if name.startswith("gemm"):
        inputs = [
            "x_real",
            graph.weight(weights, axis=0),
            graph.bias(rng.integers(-2000, 2000, outputs), axis=0),
        ]
        node = helper.make_node("Gemm", inputs, ["sum"], name, transB=1)
        return graph.finish(node, (rows, depth), is_rounded=is_rounded)
    inputs = ["x_real", graph.weight(weights.T.copy(), axis=1)]
    shape = (rows, depth) if rows == 1 else (2, rows, depth)
    return graph.finish(helper.make_node("MatMul", inputs, ["sum"], name), shape, is_rounded=is_rounded)


def dynamic_case(name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """One matrix product whose input is quantized as it comes, as `quantize_dynamic` writes it."""
    rows, depth, outputs = MATRICES[name]
    rng = np.random.default_rng([13, list(MATRICES).index(name)])
    weights = _weights(rng, (outputs, depth)).T.copy()
    scales = (0.005 + 0.01 * rng.random(outputs)).astype(np.float32)
    tensors = {"w": weights, "w_zero": np.zeros(outputs, np.int8), "w_scale": scales}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["x_q", "x_scale", "x_zero"]),
        helper.make_node("MatMulInteger", ["x_q", "w", "x_zero", "w_zero"], ["sum"], name),
        helper.make_node("Cast", ["sum"], ["sum_real"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", "w_scale"], ["scale"]),
        helper.make_node("Mul", ["sum_real", "scale"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "dynamic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows, depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, rows, outputs])],
        [numpy_helper.from_array(values, key) for key, values in tensors.items()],
    )
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(program)
    return program, {"x": (rng.beta(4, 1, (1, rows, depth)) - 0.1).astype(np.float32)}


def cases() -> dict[str, tuple[Any, dict[str, np.ndarray]]]:
    """Every model and its input, by name."""
    found = {f"{name}-dynamic": dynamic_case(name) for name in MATRICES}
    for activation in SEEDS:
        found |= {f"{name}-{activation}": conv_case(name, activation) for name in CONVS}
        found |= {f"{name}-{activation}": matrix_case(name, activation) for name in MATRICES}
        for name in MATRICES:
            found[f"{name}-{activation}-float"] = matrix_case(name, activation, is_rounded=False)
    return found


def run(program: Any, inputs: dict[str, np.ndarray], **entries: str) -> np.ndarray:
    """Run a model in ONNX Runtime on one thread, with session options."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = ort.InferenceSession(program.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def _weights(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Half of the outputs random, half of one sign: those overflow pairs most."""
    weights = rng.integers(-127, 128, shape)
    half = shape[0] // 2
    weights[:half] = np.abs(weights[:half]).clip(60)
    weights[: half // 2] *= -1
    return weights.astype(np.int8)


class _Graph:
    """A QDQ graph of one layer."""

    def __init__(self, activation: str, rng: np.random.Generator, depth: int) -> None:
        self.dtype = np.dtype(activation)
        self.rng = rng
        self.tensors: list[Any] = []
        self.nodes: list[Any] = []
        low = -128 if activation == "int8" else 0
        # int8 with a low zero point becomes uint8 with a low one: its raw bytes are as bright
        self._scalars("x", 0.02, low + 9)
        self._scalars("y", 0.02 * 0.01 * 128 * 64 * depth / 200, low + 120)

    def _scalars(self, name: str, scale: float, zero_point: int) -> None:
        self.tensors += [
            numpy_helper.from_array(np.float32(scale), f"{name}_scale"),
            numpy_helper.from_array(np.array(zero_point, self.dtype), f"{name}_zero"),
        ]

    def weight(self, weights: np.ndarray, axis: int) -> str:
        self.scales = (0.005 + 0.01 * self.rng.random(weights.shape[axis])).astype(np.float32)
        zeros = np.zeros(weights.shape[axis], np.int8)
        return self._constant("w", weights, (self.scales, zeros), axis)

    def bias(self, values: np.ndarray, axis: int) -> str:
        scales = np.asarray(np.float32(0.02) * self.scales, np.float32)
        return self._constant("b", values.astype(np.int32), (scales, np.zeros(len(values), np.int32)), axis)

    def _constant(self, name: str, values: np.ndarray, grid: tuple[np.ndarray, np.ndarray], axis: int) -> str:
        names = [f"{name}_quantized", f"{name}_scale", f"{name}_zero"]
        self.tensors += [numpy_helper.from_array(v, n) for v, n in zip((values, *grid), names, strict=True)]
        self.nodes.append(helper.make_node("DequantizeLinear", names, [f"{name}_real"], axis=axis))
        return f"{name}_real"

    def finish(
        self, node: Any, shape: tuple[int, ...], *, is_rounded: bool = True
    ) -> tuple[Any, dict[str, np.ndarray]]:
        before = [
            helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"]),
            helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_real"]),
        ]
        after = [
            helper.make_node("QuantizeLinear", ["sum", "y_scale", "y_zero"], ["y_q"]),
            helper.make_node("DequantizeLinear", ["y_q", "y_scale", "y_zero"], ["y"]),
        ]
        graph = helper.make_graph(
            [*before, *self.nodes, node, *(after if is_rounded else [])],
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [
                helper.make_tensor_value_info(
                    "y" if is_rounded else "sum", TensorProto.FLOAT, [None] * len(shape)
                )
            ],
            self.tensors,
        )
        program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(program)
        bytes_seen = np.maximum(self.rng.integers(0, 256, shape), self.rng.integers(0, 256, shape))
        return program, {"x": ((bytes_seen - 9) * 0.02).astype(np.float32)}


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **{name: run(*case) for name, case in cases().items()})
