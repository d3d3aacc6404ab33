# SPDX-License-Identifier: Apache-2.0
"""Passes over a model: one module each, its name is verb_object, its source is cited in its docstring.

A pass module offers `FORMATS` (the formats it takes), `EXTRA` (the pip extra that it needs) and
`apply(model, order) -> Result`; one that uses samples also offers `walks(order, available) -> int`, the number of
samples that it walks over; one that can be tuned offers `Options`, a frozen dataclass whose fields have defaults and
which a recipe's `[passes.<name>]` fills. It returns a new model and never touches the one it got; what it could not do
stands in `Result.notes`, which the report shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.calibrate import Calibration
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.training.spans import LearnedRange


@dataclass(frozen=True)
class Order:
    """What a pass is told: the scheme of the target, the calibration and its samples, what to leave alone.

    `samples` gives the model's inputs by name, batch 1; it can be walked any number of times. `exclude` holds names
    or types of operators that stay in float. `options` is an instance of the pass's own `Options`, None for its
    defaults. `checkpoint` is where a long walk over the samples may keep itself, so that it can be resumed.
    `on_sample` is called after every sample, for progress. `reference` is the float model, for passes that compare with
    it or learn from it. `ranges` were learned: a quantizer takes them instead of calibrated ones where it finds their
    tensors.
    """

    scheme: Scheme | None = None
    calibration: Calibration = field(default_factory=Calibration)
    samples: Iterable[Mapping[str, np.ndarray]] = ()
    exclude: tuple[str, ...] = ()
    options: object | None = None
    checkpoint: Path | None = None
    on_sample: Callable[[], None] = lambda: None
    reference: Model | None = None
    ranges: tuple[LearnedRange, ...] = ()


@dataclass(frozen=True)
class Result:
    """A pass's outcome: the new model, and what a reader of the report must know about it.

    `ranges` are those that the pass learned or, of a quantizer, that it was given and took.
    """

    model: Model
    notes: tuple[str, ...] = ()
    ranges: tuple[LearnedRange, ...] = ()
