# SPDX-License-Identifier: Apache-2.0
"""What is known about a tensor's channels without running the model: mean and standard deviation of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and standard deviation of every channel: two float64 arrays of shape (channels,)."""

    mean: np.ndarray
    deviation: np.ndarray

    def scaled(self, scale: np.ndarray, shift: np.ndarray) -> Moments:
        """The moments of scale * x + shift, channel by channel."""
        import numpy as np

        return Moments(self.mean * scale + shift, self.deviation * np.abs(scale))
