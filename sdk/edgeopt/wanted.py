# SPDX-License-Identifier: Apache-2.0
"""What later steps of a build (training, the search for mixed precision) need of what it has made so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.artifacts import Made
from edgeopt.plan import Plan
from edgeopt.recipe import Recipe
from edgeopt.sources import Source
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    from edgeopt.evaluate.samples import Samples
    from edgeopt.validate import Question


@dataclass(frozen=True)
class Wanted:
    """A build up to here; `more` is taught beside the calibration samples."""

    plan: Plan
    made: Mapping[str, Made]
    source: Source
    calibration: Samples
    evaluation: Samples | None
    more: Samples | None
    recipe: Recipe
    question: Question

    @property
    def judging(self) -> Samples:
        """The evaluation samples.

        Raises:
            RecipeError: There are none.
        """
        if self.evaluation is None:
            raise RecipeError("[search] judges files on evaluation data; give --calibration and --evaluation")
        return self.evaluation
