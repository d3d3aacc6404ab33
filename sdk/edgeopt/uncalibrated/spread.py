# SPDX-License-Identifier: Apache-2.0
"""The values that a tensor takes, channel by channel, as far as they are known without running the model.

A channel is kept as its values where its source is so many standard deviations from its mean (`NODES`). What is computed
from it value by value is computed at the nodes, so that a clip or a hard-swish spelled in five operators has its ends
exactly and its moments by quadrature, and no function needs a formula of its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

REACH = 6.0
"""How many standard deviations from its mean a channel is taken to reach (Nagel et al. 2019, section 5)."""

NODES = 97
"""Points at which a function of a channel is known; odd, so that the mean is one of them."""


@dataclass(frozen=True, eq=False)
class Spread:
    """Values of shape (NODES, channels) in float64, or (NODES, 1) where channels are not told apart.

    `root` is the tensor whose deviation the nodes count; two tensors of one root rise and fall together.
    `is_assumed` says that channels were taken as independent of each other, because nothing says how they are not.
    """

    root: str
    values: np.ndarray
    is_assumed: bool = False

    @classmethod
    def normal(
        cls, root: str, mean: np.ndarray, deviation: np.ndarray, *, is_assumed: bool = False
    ) -> Spread:
        """Normal channels; `mean` and `deviation` have shape (channels,)."""
        return cls(root, mean + nodes()[:, None] * deviation, is_assumed)

    @property
    def channels(self) -> int:
        """How many channels are told apart."""
        return int(self.values.shape[1])

    @property
    def mean(self) -> np.ndarray:
        """Of every channel: (channels,)."""
        found: np.ndarray = weights() @ self.values
        return found

    @property
    def variance(self) -> np.ndarray:
        """Of every channel: (channels,)."""
        found: np.ndarray = weights() @ (self.values - self.mean) ** 2
        return found

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest value of all channels."""
        return float(self.values.min()), float(self.values.max())

    def pooled(self, root: str) -> Spread:
        """All channels as one: the same ends, and the mixture's quantiles between them."""
        import numpy as np

        if self.channels == 1:
            return Spread(root, self.values, self.is_assumed)
        flat = self.values.reshape(-1)
        order = np.argsort(flat, kind="stable")
        share = np.repeat(weights() / self.channels, self.channels)[order]
        middle = np.cumsum(share) - share / 2
        wanted = np.cumsum(weights()) - weights() / 2
        values = np.interp(wanted, middle, flat[order])
        values[0], values[-1] = flat[order[0]], flat[order[-1]]
        return Spread(root, values[:, None], self.is_assumed)


@functools.cache
def nodes() -> np.ndarray:
    """Where channels are known, in standard deviations from the mean: (NODES,)."""
    import numpy as np

    return np.linspace(-REACH, REACH, NODES)


@functools.cache
def weights() -> np.ndarray:
    """The share of a normal channel's values at each node: (NODES,), of sum 1."""
    import numpy as np

    density = np.exp(-(nodes() ** 2) / 2)
    found: np.ndarray = density / density.sum()
    return found
