# SPDX-License-Identifier: Apache-2.0
"""Asks OpenVINO which weights of a convolution it adds in 16 bits, with one output a pair of large weights.

`ONEDNN_MAX_CPU_ISA=AVX2 python ask_openvino.py CHANNELS KERNEL` prints the pairs that overflow, as JSON: two indices into
the weights of an output as ONNX has them. The variable must be there before the library is loaded.
"""

import itertools
import json
import sys

import numpy as np
import openvino
from onnx import ModelProto, TensorProto, helper, numpy_helper

LARGEST, BRIGHTEST = 127, 255


def model(weights: np.ndarray) -> ModelProto:
    """Uint8 activations and int8 weights, all scales 1."""
    outputs, channels, kernel, _ = weights.shape
    constants = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "w": weights,
        "ones": np.ones(outputs, np.float32),
        "zeros": np.zeros(outputs, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ones", "zeros"], ["wd"], axis=0),
        helper.make_node("Conv", ["d", "wd"], ["y"], kernel_shape=[kernel, kernel]),
    ]
    graph = helper.make_graph(
        nodes,
        "pairs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    channels, kernel = int(sys.argv[1]), int(sys.argv[2])
    pairs = list(itertools.combinations(range(channels * kernel * kernel), 2))
    weights = np.zeros((len(pairs), channels * kernel * kernel), np.int8)
    for number, pair in enumerate(pairs):
        weights[number, list(pair)] = LARGEST
    core = openvino.Core()
    program = model(weights.reshape(len(pairs), channels, kernel, kernel)).SerializeToString()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(program), "CPU", settings)
    (found,) = compiled([np.full((1, channels, 8, 8), BRIGHTEST, np.float32)]).values()
    lowest = found[0].reshape(len(pairs), -1).min(axis=1)
    over = [pair for pair, value in zip(pairs, lowest, strict=True) if value < 2 * LARGEST * BRIGHTEST]
    print(json.dumps(over))


if __name__ == "__main__":
    main()
