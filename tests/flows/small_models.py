# SPDX-License-Identifier: Apache-2.0
"""A small convolutional net, untrained and seeded, for builds in tests; run as a file or imported as a factory."""

from typing import Any


def net() -> Any:
    """A module and its example input: depthwise and pointwise convolutions, batch norm, pooling, a classifier."""
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(16, 16, 3, padding=1, groups=16),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(16, 256, 1),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(256, 256, 1),
        torch.nn.ReLU6(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(256, 10),
    )
    return module.eval(), torch.zeros(1, 3, 32, 32)


def lone_net() -> Any:
    """The module alone: nothing says its input."""
    return net()[0]


def fft_net() -> Any:
    """A net with an operator that neither ONNX nor LiteRT has."""
    import torch

    class Spectrum(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.linalg.svdvals(x)

    return Spectrum(), torch.zeros(1, 3, 8, 8)


def broken() -> Any:
    """A factory that fails."""
    raise RuntimeError("no weights here")


def fragile_net() -> Any:
    """A net that int8 breaks in one place: one channel of an activation is 300 times the others, and then undone."""
    import torch

    module, example = net()
    with torch.no_grad():
        module[5].weight[0] *= 300
        module[5].bias[0] = 0
        module[7].weight[:, 0] /= 300
    module[6] = torch.nn.ReLU()
    return module, example
