# SPDX-License-Identifier: Apache-2.0
"""A small net with batch norms, really trained on scikit-learn's digits; run as a file or imported as a factory."""

from functools import cache
from typing import Any

import numpy as np

LOW, HIGH = 0.0, 1.0
TRAINED = 1500


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 1, 8, 8) from 0 to 1, and their digits, shuffled."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.images[order, None] / 16).astype(np.float32), found.target[order]


@cache
def trained() -> Any:
    """The module after four epochs: a residual, a hard-swish, a gate, a padded depthwise convolution."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.n0 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
            self.deep, self.n1 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
            self.wide, self.n2 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
            self.gate = nn.Linear(16, 16)
            self.last, self.n3 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
            self.classify = nn.Linear(32, 10)

        def forward(self, x: Any) -> Any:
            x = functional.relu6(self.n0(self.stem(x)))
            y = functional.hardswish(self.n1(self.deep(x)))
            x = x + self.n2(self.wide(y))
            x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
            return self.classify(functional.relu(self.n3(self.last(x))).mean((2, 3)))

    net = Net()
    images, targets = (torch.from_numpy(array[:TRAINED]) for array in digits())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(4):
        for start in range(0, TRAINED, 50):
            loss = functional.cross_entropy(
                net(images[start : start + 50]), targets[start : start + 50].long()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def net() -> Any:
    """The module and its example input."""
    import torch

    return trained(), torch.zeros(1, 1, 8, 8)
