# SPDX-License-Identifier: Apache-2.0
"""Prints how the prediction of an int8 file agrees with its runtime, tensor by tensor and through the whole net.

    python tests/edgeopt/simulate/measure_agreement.py MODEL SAMPLES.npz [COUNT] [--native-int8]

MODEL is .onnx (QDQ) or .tflite; the archive has one array of samples (n, 1, ...) an input, in the order of the inputs,
or in NCHW where the file wants NHWC. `--native-int8` asks for the graph that ONNX Runtime makes on ARM.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgeopt.simulate.check import Checked, check_litert, check_onnx
from edgeopt.simulate.litert_net import LitertNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("count", type=int, nargs="?", default=20)
    parser.add_argument("--native-int8", action="store_true")
    args = parser.parse_args()
    arrays = [array for name, array in np.load(args.samples).items() if name != "labels"]
    if args.model.suffix == ".onnx":
        program = onnx.load(args.model)
        names = [entry.name for entry in program.graph.input]
        checked = check_onnx(program, rows(names, arrays, args.count), native_int8=args.native_int8)
    else:
        data = args.model.read_bytes()
        net = LitertNet(data)
        last = [turned(array, shape) for array, shape in zip(arrays, net.input_shapes, strict=True)]
        checked = check_litert(data, rows(net.inputs, last, args.count))
    show(args.model, checked)


def rows(names: Any, arrays: list[np.ndarray], count: int) -> list[dict[str, np.ndarray]]:
    parts = zip(*arrays, strict=True)
    return [dict(zip(names, part, strict=True)) for part in itertools.islice(parts, count)]


def turned(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array if array.shape[1:] == shape else np.ascontiguousarray(array.transpose(0, 1, 3, 4, 2))


def show(model: Path, checked: Checked) -> None:
    lines = [f"{model.name}:", *(f"  {line}" for line in checked.sentences())]
    worst = sorted(checked.pieces, key=lambda entry: (entry.near_share, entry.exact - entry.values))
    lines += [
        f"    {entry.name[-60:]}: {entry.sentence()}" for entry in worst[:3] if entry.exact < entry.values
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
