# SPDX-License-Identifier: Apache-2.0
"""Scale active inputs up before rounding and their source down: what matters most is rounded finest.

Lin et al. 2023, "AWQ", section 3.2: the scale of an input is its mean size to the power alpha, and alpha is searched so
that the output of the layers that read the input changes least. Here that change is told from the second moments of the
input, tr(D M D^T) for a weight error D, so that no sample is run again; the mean size is the root of the mean square.
The clipping that follows (their section 4) is `mse.quantize` with the importance of each input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeopt.weights import mse
from edgeopt.weights.grid import Grid

if TYPE_CHECKING:
    import numpy as np

ALPHAS = tuple(step / 10 for step in range(11))


def input_scale(weights: Sequence[np.ndarray], grid: Grid, moments: np.ndarray) -> np.ndarray:
    """The scale of each input, (inputs,), for all `weights` (outputs, inputs) that read it; ones if none helps."""
    import numpy as np

    energy = np.maximum(np.diag(moments).astype(np.float64), 0.0)
    floor = max(float(energy.max()) * 1e-8, 1e-20)
    size = np.sqrt(np.maximum(energy, floor))
    best, least = np.ones_like(size), np.inf
    for alpha in ALPHAS:
        scale = size**alpha
        scale /= np.sqrt(scale.max() * scale.min())  # as the authors': the range stays centred on 1
        change = sum(
            output_change(weight, rounded_with(weight, grid, moments, scale), moments) for weight in weights
        )
        if change < least:
            best, least = scale, change
    return best


def rounded_with(weight: np.ndarray, grid: Grid, moments: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What the layer computes with, seen from the unscaled input."""
    import numpy as np

    importance = np.diag(moments) / scale**2
    values: np.ndarray = mse.quantize(weight * scale, grid, importance).floats(weight.shape[1]) / scale
    return values


def output_change(weight: np.ndarray, rounded: np.ndarray, moments: np.ndarray) -> float:
    """The sum of the squared change of the layer's output over all inputs that `moments` has seen."""
    import numpy as np

    error = weight.astype(np.float64) - rounded
    return float(np.einsum("oi,oi->", error @ moments, error))
