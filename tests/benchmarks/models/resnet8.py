# SPDX-License-Identifier: Apache-2.0
"""MLPerf Tiny's ResNet8 on CIFAR-10: the published float weights, and the int8 file that was published with them.

The float file is a LiteRT one, and the net is small and fixed: it is written here in PyTorch, takes its weights from the
file, and must give the file's own outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pictures import read_cifar
from work import Unavailable

from models import CALIBRATION, EVALUATION, About, Place, write_samples, write_torch

NAMES = ("resnet8",)
STRIDES = {3: 2, 5: 2, 6: 2, 8: 2}
"""Convolutions, by the number in their name, that halve the picture."""
TOLERANCE = 1e-5
"""Float sums in another order; the outputs are probabilities."""


def prepare(place: Place) -> About:
    import torch

    floats = place.data("mlperf-tiny/pretrainedResnet.tflite")
    given = place.data("mlperf-tiny/pretrainedResnet_quant.tflite")
    train, _ = read_cifar(place.data("cifar10/cifar10-train-20k.zip"), every=100)
    test, labels = read_cifar(place.data("cifar10/cifar10-test-5k.zip"))
    module = _rebuild(floats)
    _check_equal(module, floats, test[:32])
    files, notes, (name,) = write_torch(place, module, (torch.zeros(1, 3, 32, 32),))
    write_samples(place.folder / CALIBRATION, {name: train})
    write_samples(place.folder / EVALUATION, {name: test}, labels)
    description = f"MLPerf Tiny ResNet8; {len(train)} pictures of CIFAR-10 calibrate, {len(test)} test pictures evaluate"
    return About(
        description, "classification", files, given={"MLPerf Tiny's own int8 file": str(given)}, notes=notes
    )


def _rebuild(path: Path) -> Any:
    import torch
    from torch import nn

    weights = _weights(path)

    class Resnet8(nn.Module):
        """Three stages of two convolutions with a shortcut; (1, 3, 32, 32) of 0 to 255 gives 10 probabilities."""

        def __init__(self) -> None:
            super().__init__()
            self.convolutions = nn.ModuleList()
            for number in range(9):
                kernel, bias = (torch.from_numpy(array) for array in weights[number])
                out, size, _, inner = kernel.shape
                layer = nn.Conv2d(inner, out, size, STRIDES.get(number, 1))
                layer.weight.data, layer.bias.data = kernel.permute(0, 3, 1, 2).contiguous(), bias
                self.convolutions.append(layer)
            kernel, bias = (torch.from_numpy(array) for array in weights["dense"])
            self.dense = nn.Linear(64, 10)
            self.dense.weight.data, self.dense.bias.data = kernel, bias

        def convolve(self, number: int, x: Any) -> Any:
            """One convolution with TensorFlow's padding, which halves from the other end than PyTorch's."""
            layer = self.convolutions[number]
            if layer.kernel_size[0] == 3:
                x = nn.functional.pad(x, (0, 1, 0, 1) if layer.stride[0] == 2 else (1, 1, 1, 1))
            return layer(x)

        def forward(self, x: Any) -> Any:
            """Give the probabilities."""
            relu = nn.functional.relu
            x = relu(self.convolve(0, x))
            x = relu(x + self.convolve(2, relu(self.convolve(1, x))))
            for first, second, shortcut in ((3, 4, 5), (6, 7, 8)):
                x = relu(self.convolve(shortcut, x) + self.convolve(second, relu(self.convolve(first, x))))
            return torch.softmax(self.dense(nn.functional.avg_pool2d(x, 8).flatten(1)), 1)

    return Resnet8().eval()


def _weights(path: Path) -> dict[Any, tuple[Any, Any]]:
    """Kernel and bias of every convolution, by the number in its name, and of the dense layer."""
    import re

    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    found: dict[Any, tuple[Any, Any]] = {}
    names = {tensor["index"]: tensor["name"] for tensor in interpreter.get_tensor_details()}
    for step in interpreter._get_ops_details():
        if step["op_name"] in {"CONV_2D", "FULLY_CONNECTED"}:
            _, kernel, bias = (int(index) for index in step["inputs"])
            numbered = re.fullmatch(r"model/conv2d(?:_(\d+))?/Conv2D", names[kernel])
            key = int(numbered[1] or 0) if numbered else "dense"
            found[key] = (interpreter.get_tensor(kernel).copy(), interpreter.get_tensor(bias).copy())
    return found


def _check_equal(module: Any, path: Path, pictures: Any) -> None:
    import numpy as np
    import torch
    from running import open_file

    run = open_file(path, 1)
    with torch.no_grad():
        ours = module(torch.from_numpy(pictures)).numpy()
    theirs = np.concatenate([run({"x": picture[None]})[0] for picture in pictures])
    if np.abs(ours - theirs).max() > TOLERANCE:
        raise Unavailable(f"the rebuilt ResNet8 differs from its file by {np.abs(ours - theirs).max():.2g}")
