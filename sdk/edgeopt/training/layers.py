# SPDX-License-Identifier: Apache-2.0
"""A layer with weights, in training: its weights on their grid, its batch normalization folded in.

Folding in training follows Krishnamoorthi 2018, section 3.2.2: weights are scaled by what the running statistics say
before they are rounded, the batch's own statistics act behind the convolution, and from some step on only the frozen
running statistics are left, which is exactly what is exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeopt.training.grids import WeightGrid

aten = torch.ops.aten


@dataclass(frozen=True)
class Form:
    """Where an operator has its tensors: positions among its arguments, and the weight's axis of output channels."""

    values: int
    weight: int
    bias: int | None
    axis: int


FORMS = {
    aten.conv1d.default: Form(0, 1, 2, 0),
    aten.conv2d.default: Form(0, 1, 2, 0),
    aten.conv2d.padding: Form(0, 1, 2, 0),
    aten.conv3d.default: Form(0, 1, 2, 0),
    aten.linear.default: Form(0, 1, 2, 0),
    aten.addmm.default: Form(1, 2, 0, 1),
    aten.mm.default: Form(0, 1, None, 1),
    aten.matmul.default: Form(0, 1, None, 1),
}
"""Operators whose weights become int8 per output channel. Transposed convolutions run in float everywhere here."""


@dataclass(frozen=True)
class Statistics:
    """What batch normalization of one batch saw, per channel."""

    mean: torch.Tensor
    variance: torch.Tensor


class Normalization(nn.Module):  # type: ignore[misc]
    """Batch normalization behind a layer. `is_frozen` leaves only the running statistics."""

    running_mean: torch.Tensor
    running_variance: torch.Tensor

    def __init__(
        self,
        scale: torch.Tensor,
        shift: torch.Tensor,
        running: Statistics,
        *,
        momentum: float,
        epsilon: float,
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.detach().clone())
        self.shift = nn.Parameter(shift.detach().clone())
        self.register_buffer("running_mean", running.mean.detach().clone())
        self.register_buffer("running_variance", running.variance.detach().clone())
        self.momentum, self.epsilon = momentum, epsilon
        self.is_frozen = False
        self.seen: Statistics | None = None

    def gain(self) -> torch.Tensor:
        """What folding multiplies each output channel's weights by."""
        return self.scale / torch.sqrt(self.running_variance + self.epsilon)

    def statistics(self, values: torch.Tensor) -> Statistics:
        """Use the batch's statistics while learning, the running ones when frozen or evaluated.

        A recomputed forward (gradient checkpointing) overwrites `seen` with the same figures, so that `settle` counts
        every batch once.
        """
        if self.is_frozen or not self.training:
            return Statistics(self.running_mean, self.running_variance)
        axes = [axis for axis in range(values.dim()) if axis != 1]
        variance, mean = torch.var_mean(values, axes, correction=0)
        count = values.numel() // values.shape[1]
        self.seen = Statistics(mean.detach(), variance.detach() * count / max(count - 1, 1))
        return Statistics(mean, variance)

    def settle(self) -> None:
        """Let the last batch's statistics enter the running ones."""
        if self.seen is not None:
            self.running_mean.lerp_(self.seen.mean, self.momentum)
            self.running_variance.lerp_(self.seen.variance, self.momentum)
        self.seen = None


class Layer(nn.Module):  # type: ignore[misc]
    """A convolution or matrix product with quantized weights; `is_on` is False while ranges are gathered."""

    def __init__(self, call: Any, form: Form, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.call, self.form, self.keywords = call, form, keywords
        self.arguments = list(arguments)
        self.weight = nn.Parameter(arguments[form.weight].detach().clone())
        given = arguments[form.bias] if form.bias is not None and form.bias < len(arguments) else None
        self.bias = None if given is None else nn.Parameter(given.detach().clone())
        for position in (form.values, form.weight, form.bias):
            if position is not None and position < len(self.arguments):
                self.arguments[position] = None
        self.norm: Normalization | None = None
        self.grid: WeightGrid | None = None
        self.is_on = False

    def prepare(self, bits: int, *, per_channel: bool) -> None:
        """Fit the weights' grid; call it once, after `norm` is set."""
        self.grid = WeightGrid(self._folded_weight(), self.form.axis if per_channel else None, bits)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Compute the layer, normalized if it has a normalization."""
        weight = self._folded_weight()
        if self.is_on and self.grid is not None:
            weight = self.grid(weight)
        if self.norm is None:
            return self._run(values, weight, self.bias)
        if self.norm.is_frozen or not self.norm.training:
            return self._run(values, weight, self._folded_bias())
        return self._normalized(self._run(values, weight, None), values.dim())

    def exported(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weights on their grid and the bias, both folded."""
        with torch.no_grad():
            weight = self._folded_weight()
            return (weight if self.grid is None else self.grid(weight)), self._folded_bias()

    def _normalized(self, scaled: torch.Tensor, rank: int) -> torch.Tensor:
        """Undo the running scale, then normalize by the batch's statistics."""
        assert self.norm is not None  # for the type checker
        shape = [1, -1, *[1] * (rank - 2)]
        gain = self.norm.gain()
        raw = scaled / torch.where(gain == 0, torch.ones_like(gain), gain).reshape(shape)
        if self.bias is not None:
            raw = raw + self.bias.reshape(shape)
        found = self.norm.statistics(raw)
        scale = self.norm.scale / torch.sqrt(found.variance + self.norm.epsilon)
        return (raw - found.mean.reshape(shape)) * scale.reshape(shape) + self.norm.shift.reshape(shape)

    def _folded_weight(self) -> torch.Tensor:
        if self.norm is None:
            return self.weight
        shape = [1] * self.weight.dim()
        shape[self.form.axis] = -1
        return self.weight * self.norm.gain().reshape(shape)

    def _folded_bias(self) -> torch.Tensor | None:
        if self.norm is None:
            return self.bias
        before = 0.0 if self.bias is None else self.bias
        return self.norm.shift + (before - self.norm.running_mean) * self.norm.gain()

    def _run(self, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        arguments = list(self.arguments)
        arguments[self.form.values], arguments[self.form.weight] = values, weight
        if self.form.bias is not None:
            if bias is not None and self.form.bias == len(arguments):
                arguments.append(bias)
            elif self.form.bias < len(arguments):
                arguments[self.form.bias] = bias
        result: torch.Tensor = self.call(*arguments, **self.keywords)
        return result


def is_product(call: Any) -> bool:
    """Say whether an operator is a matrix product, whose integer kernels can write floats."""
    return call in (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
