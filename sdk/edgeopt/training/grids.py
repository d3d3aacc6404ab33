# SPDX-License-Identifier: Apache-2.0
"""Integer grids whose step is learned together with the weights.

Rounding passes gradients through, clipping passes them to the step (LSQ: Esser et al. 2020, "Learned step size
quantization", section 2.1); the zero point of an asymmetric activation is learned too (LSQ+: Bhalgat et al. 2020,
section 3.1).

Rules:
- Steps are learned as a factor e^t of where calibration put them: Adam moves every parameter by about its rate, and a
  step of 0.003 moved by 0.001 would be lost (log domain: Jain et al. 2020, "Trained quantization thresholds",
  section 3.2). Adam is blind to the scale of a gradient, so LSQ's 1/sqrt(N Q) has nothing to do here.
- A weight's step is never larger than its channel's max|w| / Q: the largest weight then lands on Q exactly, and a
  native quantizer that looks for max|w| finds the same step.
- A grid always holds zero. Where only one sign was seen, zero stays its end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SMALLEST_STEP = 1e-12
"""The step of a channel or tensor that is all zeros."""

_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
_ZERO_POINT_GAIN = 100.0  # a rate of 0.001 moves a zero point by a tenth of an integer


class _Round(torch.autograd.Function):  # type: ignore[misc]
    """Round to the nearest integer, ties to even; the gradient passes straight through (Bengio et al. 2013)."""

    @staticmethod
    def forward(_context: Any, values: torch.Tensor) -> torch.Tensor:
        return values.round()

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _round(values: torch.Tensor) -> torch.Tensor:
    rounded: torch.Tensor = _Round.apply(values)
    return rounded


class WeightGrid(nn.Module):  # type: ignore[misc]
    """Symmetric integers -Q..Q, Q = 2^(bits-1) - 1, per output channel, or with `axis` None per tensor."""

    start: torch.Tensor

    def __init__(self, weight: torch.Tensor, axis: int | None, bits: int) -> None:
        super().__init__()
        self.largest = 2 ** (bits - 1) - 1
        self.others = tuple(other for other in range(weight.dim()) if other != axis)
        self.register_buffer("start", self._fitted(weight.detach()))
        self.change = nn.Parameter(torch.zeros_like(self.start))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weights on their grid."""
        return self.integers(weight) * self.step(weight)

    def integers(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weights in units of their channel's step, as whole floats."""
        return _round((weight / self.step(weight)).clamp(-self.largest, self.largest))

    def step(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the step of every output channel, shaped so that it broadcasts."""
        widest = weight.abs().amax(self.others, keepdim=True) / self.largest
        return torch.minimum(self.start * self.change.exp(), widest).clamp_min(SMALLEST_STEP)

    def _fitted(self, weight: torch.Tensor) -> torch.Tensor:
        """The step with the least squared error of every channel, from a few shares of its largest weight."""
        widest = weight.abs().amax(self.others, keepdim=True) / self.largest
        best = widest.clamp_min(SMALLEST_STEP)
        least = torch.full_like(best, float("inf"))
        for fraction in _FRACTIONS:
            step = (widest * fraction).clamp_min(SMALLEST_STEP)
            rounded = (weight / step).clamp(-self.largest, self.largest).round() * step
            error = (rounded - weight).square().sum(self.others, keepdim=True)
            best = torch.where(error < least, step, best)
            least = torch.minimum(error, least)
        return best


class ActivationGrid(nn.Module):  # type: ignore[misc]
    """Eight bits for a whole tensor; `is_on` is False while ranges are still being gathered."""

    start: torch.Tensor
    start_zero: torch.Tensor

    def __init__(self, *, is_symmetric: bool) -> None:
        super().__init__()
        self.is_on = False
        self.is_symmetric = is_symmetric
        self.levels = (-127, 127) if is_symmetric else (0, 255)
        self.register_buffer("start", torch.ones(()))
        self.register_buffer("start_zero", torch.zeros(()))
        self.change = nn.Parameter(torch.zeros(()))
        self.zero_change = nn.Parameter(torch.zeros(()))

    def begin(self, low: float, high: float) -> None:
        """Start from a range; low <= 0 <= high."""
        if self.is_symmetric:
            self.start.fill_(max(max(-low, high) / 127, SMALLEST_STEP))
        else:
            step = max((high - low) / 255, SMALLEST_STEP)
            self.start.fill_(step)
            self.start_zero.fill_(round(-low / step))
        self.is_on = True

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values on the grid, ends included."""
        if not self.is_on:
            return values
        step, zero = self._step(), self._zero()
        integers = (_round(values / step) + zero).clamp(*self.levels)
        return (integers - zero) * step

    def span(self) -> tuple[float, float]:
        """Return the ends of the grid, from which a native quantizer finds the same step and zero point."""
        with torch.no_grad():
            step, zero = float(self._step()), float(self._zero())
        return (self.levels[0] - zero) * step, (self.levels[1] - zero) * step

    def _step(self) -> torch.Tensor:
        return self.start * self.change.exp()

    def _zero(self) -> torch.Tensor:
        if not self.levels[0] < float(self.start_zero) < self.levels[1] or self.is_symmetric:
            return self.start_zero
        return _round((self.start_zero + self.zero_change * _ZERO_POINT_GAIN).clamp(*self.levels))
