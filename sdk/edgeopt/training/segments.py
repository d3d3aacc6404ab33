# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing: keep the activations between segments only, compute those within again when going back.

Source: Chen et al. 2016, "Training deep nets with sublinear memory cost", section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint


class _Recomputed(torch.nn.Module):  # type: ignore[misc]
    """A segment whose inner activations are not kept."""

    def __init__(self, segment: torch.nn.Module) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, *values: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.segment(*values)
        return checkpoint(self.segment, *values, use_reentrant=False)


def in_segments(graph: fx.GraphModule, count: int) -> fx.GraphModule:
    """Cut a graph into `count` segments of about equally many operators; it shares all weights with `graph`."""
    operators = [node for node in graph.graph.nodes if node.op in ("call_function", "call_module")]
    place = {node.name: number * count // len(operators) for number, node in enumerate(operators)}
    parts = split_module(graph, graph, lambda node: place.get(node.name, 0))
    for name, child in list(parts.named_children()):
        if name.startswith("submod_"):
            setattr(parts, name, _Recomputed(child))
    return parts
