# SPDX-License-Identifier: Apache-2.0
"""A user's own figure: `task = "package.module:function"` or `"file.py:function"`.

The function is called as `function(outputs, labels)`. `outputs` is a dict of float32 arrays by output name, samples
first; `labels` is one array, samples first, or a list with a dict of arrays a sample, or None where the data has none.
It returns one number a sample (their mean is the figure; booleans are right and wrong), or one number for all. One
number gets its interval by calling the function `resamples` times with samples drawn again, so it must not depend on
their order and must stand a sample twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.evaluate.scores import Score, Scores, mean_score
from edgeopt.factory import find_function
from edgeopt_wire.errors import EdgeoptError, RecipeError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs


@dataclass(frozen=True)
class Options:
    """`name` is what the report calls the figure (default: the function's name); `is_share` says it in points."""

    function: str = ""
    name: str = ""
    higher_is_better: bool = True
    is_share: bool = False
    resamples: int = 200

    def __post_init__(self) -> None:
        if not self.function:
            raise ValueError("give `function`, as package.module:function or file.py:function")
        if self.resamples < 0:
            raise ValueError(f"resamples must not be negative, found {self.resamples}")


def check(options: Options) -> None:
    """Import the function.

    Raises:
        RecipeError: It cannot be imported.
    """
    find_function(options.function)


def score(outputs: Outputs, baseline: Outputs, options: Options) -> Scores:
    """Call the user's function.

    Raises:
        RecipeError: It cannot be imported, fails, or returns neither a number a sample nor one number.
    """
    import numpy as np

    del baseline
    function = find_function(options.function)
    every = np.arange(len(outputs))
    values = _call(function, options.function, outputs, every)
    name = options.name or options.function.rpartition(":")[2]
    if values.ndim == 1:
        found = mean_score(name, values, higher_is_better=options.higher_is_better, is_share=options.is_share)
        return Scores((found,))

    def weigh(weights: np.ndarray) -> float:
        again = _call(function, options.function, outputs, np.repeat(every, weights.astype(np.int64)))
        return float(again)

    return Scores(
        (
            Score(
                name,
                float(values),
                len(outputs),
                options.higher_is_better,
                options.is_share,
                weigh=weigh,
                resamples=options.resamples,
            ),
        )
    )


def _call(function: Callable[..., Any], spec: str, outputs: Outputs, chosen: np.ndarray) -> np.ndarray:
    import numpy as np

    arrays = {name: array[chosen] for name, array in outputs.arrays.items()}
    labels: Any = None
    if outputs.annotations is not None:
        labels = [dict(outputs.annotations[number]) for number in chosen]
    elif outputs.labels is not None:
        labels = outputs.labels[chosen]
    try:
        values = np.asarray(function(arrays, labels))
    except EdgeoptError:
        raise
    except Exception as error:
        raise RecipeError(f"{spec}(outputs, labels) failed: {type(error).__name__}: {error}") from error
    if values.dtype.kind not in "fiub" or values.shape not in ((), (len(chosen),)):
        raise RecipeError(
            f"{spec}(outputs, labels) must return one number for all or one a sample, an array of shape "
            f"({len(chosen)},); found {values.dtype} {values.shape}"
        )
    return values if values.dtype.kind == "b" else values.astype(np.float64)
