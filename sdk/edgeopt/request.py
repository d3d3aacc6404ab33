# SPDX-License-Identifier: Apache-2.0
"""What a build is asked for, and what goes in: the model and its data, loaded and digested."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.budget import Budget
from edgeopt.extras import check_extras
from edgeopt.plan import Plan
from edgeopt.recipe import Recipe
from edgeopt.sources import Source, load_source
from edgeopt.uncalibrated import making as uncalibrated
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    from edgeopt.evaluate.preprocess import Preprocess
    from edgeopt.evaluate.samples import Samples
    from edgeopt.evaluate.texts import TextPreprocess


@dataclass(frozen=True)
class BuildRequest:
    """What the command line asks for. `quick` measures shorter and once, for a first look."""

    model: str
    device: str
    calibration: str = ""
    evaluation: str = ""
    evaluation_limit: int | None = None
    budget: Budget = field(default_factory=Budget)
    recipe: Recipe = field(default_factory=Recipe)
    output: Path = Path()
    quick: bool = False
    builder: Any = None
    """Signs the statement of provenance (a securesystemslib signer), or nobody does."""


@dataclass(frozen=True)
class Loaded:
    """Everything that goes in, loaded and digested."""

    source: Source
    calibration: Samples | None
    evaluation: Samples | None
    labels: tuple[str, ...]
    training: Samples | None = None
    stand_in: Samples | None = None
    """Noise in place of calibration data, where none is wanted."""
    preprocess: Preprocess | TextPreprocess | None = None


def load_inputs(request: BuildRequest, plan: Plan) -> Loaded:
    """Load the model and its data, and refuse at once what would fail later.

    Raises:
        RecipeError: Something is not there or does not fit.
        UnsupportedError: An extra is not installed.
    """
    from edgeopt.evaluate.preprocess import read_preprocess
    from edgeopt.evaluate.samples import load_samples

    uncalibrated.check(request.recipe, request.calibration)
    source = load_source(request.model, request.recipe)
    check_extras(plan, source)
    keys = dict(request.recipe.preprocess or source.preprocess)
    inputs = source.model.inputs
    preprocess = read_preprocess(keys, inputs)
    calibration = evaluation = training = None
    if request.calibration:
        wanted = request.recipe.calibration.samples
        calibration = load_samples(request.calibration, inputs, preprocess, limit=wanted, seed=0)
    if request.evaluation:
        limit = request.evaluation_limit
        evaluation = load_samples(request.evaluation, inputs, preprocess, limit=limit, seed=1)
    if data := request.recipe.train.data:
        training = load_samples(data, inputs, preprocess, limit=request.recipe.train.samples, seed=2)
    labels = source.labels
    if request.recipe.labels:
        labels = _read_labels(Path(request.recipe.labels))
    stand_in = (
        uncalibrated.stand_in(source, request.recipe) if uncalibrated.is_asked(request.recipe) else None
    )
    return Loaded(source, calibration, evaluation, labels, training, stand_in, preprocess)


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the labels {path}: {error}") from error
