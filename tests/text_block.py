# SPDX-License-Identifier: Apache-2.0
"""A text encoder in little, for tests of what makes transformers small."""

from __future__ import annotations

from typing import Any

import torch


class Block(torch.nn.Module):  # type: ignore[misc]
    """A table, attention and two layers, as in every text encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(512, 32)
        self.norm = torch.nn.LayerNorm(32)
        self.qkv = torch.nn.Linear(32, 96)
        self.wide = torch.nn.Linear(32, 128)
        self.out = torch.nn.Linear(128, 32)

    def forward(self, tokens: Any) -> Any:
        x = self.table(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + torch.softmax(q @ k.transpose(-2, -1) / 4, -1) @ v
        y = self.wide(x)
        return x + self.out(0.5 * y * (1 + torch.erf(y / 2**0.5)))
