# SPDX-License-Identifier: Apache-2.0
"""The int8 files of a build without data: statistics, rounded weights, quantized in every format, each called so.

What asks how the outputs change is left out, because nothing here may judge: equalizing, bias correction, training,
the search for mixed precision. Weights are rounded by second moments of noise: EfficientNet-Lite0 gained 5 dB by it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.artifacts import Adapted, Made, lower, optimize
from edgeopt.onnx_graphs import fold, observer
from edgeopt.passes import Order
from edgeopt.passes.round_weights import Options as RoundOptions
from edgeopt.plan import FROM_ONNX, Artifact, Plan
from edgeopt.recipe import Recipe
from edgeopt.search import Aim
from edgeopt.sources import Source, file_digest
from edgeopt.uncalibrated import LABEL, METHOD, SAID
from edgeopt.uncalibrated.noise import SAMPLES, Interval, Noise
from edgeopt.uncalibrated.promises import Promised, fingerprint
from edgeopt.uncalibrated.statistics import Statistics, read_statistics
from edgeopt.workbench import Workbench
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    from edgeopt.progress import Step

DAMPING = 0.1
"""Of rounding by noise: trusts it less than photos, whose 0.01 gave 0.5 dB less here (EfficientNet-Lite0)."""

NO_SEARCH = "no mixed precision was searched for --max-drop: a search takes calibration data"
"""What a reader is told who sets a drop, because other builds then search."""

_FILE = "statistics.json"
_log = logging.getLogger(__name__)


def is_asked(recipe: Recipe) -> bool:
    """Whether int8 files are to be made without data."""
    return recipe.calibration.method == METHOD


def check(recipe: Recipe, calibration: str) -> None:
    """Refuse what cannot be had without data.

    Raises:
        RecipeError: Calibration data is given too, or training or a search is asked for.
    """
    if not is_asked(recipe):
        return
    what = f'calibration method "{METHOD}" sees no data'
    if calibration:
        raise RecipeError(
            f"{what}, and --calibration {calibration} is given: remove one of them; data is the better one"
        )
    if recipe.train.when == "always":
        raise RecipeError(f"{what}, and training needs some: give --calibration DATA, or remove [train]")
    if recipe.search != Aim():
        raise RecipeError(
            f"{what}, and a search for mixed precision needs some: give --calibration and --evaluation DATA, or remove [search]"
        )
    if recipe.effort == "extensive":
        raise RecipeError(
            f'{what}, and effort = "extensive" chooses everything by the outputs on some: give --calibration DATA, or '
            'effort = "default"'
        )


def stand_in(source: Source, recipe: Recipe) -> Noise:
    """Noise for the source's inputs, within the range that the recipe declares or preprocessing gives.

    Raises:
        RecipeError: Nothing says the range, or an input takes integers.
    """
    interval = Interval.find(recipe.calibration.input_range, recipe.preprocess or source.preprocess)
    return Noise(source.model.inputs, interval, min(recipe.calibration.samples, SAMPLES))


def make_int8(
    plan: Plan, source: Source, floats: Mapping[str, Made], recipe: Recipe, bench: Workbench
) -> dict[str, Made]:
    """Make every int8 artifact of the plan from the float models of its formats, without data.

    Raises:
        RecipeError: No batch normalization is left to read, or nothing says the inputs' range.
    """
    wanted = [artifact for artifact in plan.artifacts if artifact.precision == "int8"]
    if not wanted:
        return {}
    _log.warning("%s: %s", source.model.name, SAID)
    noise = stand_in(source, recipe)
    base = floats.get("onnx") or lower("onnx", source.model, source.sha256, bench)
    making = _Making(source, noise, recipe, bench, replace(base, origin=base.file))
    statistics = making.statistics()
    return {artifact.id: making.make(artifact, floats, statistics) for artifact in wanted}


@dataclass(frozen=True)
class _Making:
    source: Source
    noise: Noise
    recipe: Recipe
    bench: Workbench
    base: Made

    def statistics(self) -> Statistics:
        """Read them, as a cached stage."""
        key = {
            "stage": "batch normalization",
            "source": self.source.sha256,
            "base": file_digest(self.base.file),
            "noise": self.noise.digest,
        }

        def make(folder: Path, step: Step) -> None:  # noqa: ARG001 - it has no steps
            found = read_statistics(
                self.source.model, self.base.model().program, self._sample(), self.noise.interval
            )
            (folder / _FILE).write_bytes(to_bytes(found))

        folder = self.bench.stage("read batch normalization", key, make)
        return from_bytes(Statistics, (folder / _FILE).read_bytes())

    def make(self, artifact: Artifact, floats: Mapping[str, Made], statistics: Statistics) -> Made:
        """One int8 file, and what its reader must know."""
        base, hub = self._base(artifact, floats)
        known = self._known(hub, statistics)
        given = {
            entry.name: getattr(self.recipe.calibration, entry.name)
            for entry in dataclasses.fields(self.recipe.calibration)
        }
        order = Order(
            scheme=artifact.scheme,
            calibration=Promised(**given, known=known),
            samples=Adapted(self.noise, self.source.model.inputs, base.description.inputs),
            exclude=self.recipe.exclude,
            options=self.recipe.options(artifact.pass_name),
        )
        made = optimize(artifact, base, order, self.noise, self.bench)
        found = made.description
        notes = (SAID, *statistics.notes(), *found.notes)
        return replace(
            made, description=replace(found, notes=notes, extra={**found.extra, "calibration": LABEL})
        )

    def _base(self, artifact: Artifact, floats: Mapping[str, Made]) -> tuple[Made, Made]:
        """What an artifact is quantized from, and the ONNX form with the same weights."""
        is_onnx = artifact.format in ("onnx", *FROM_ONNX)
        scheme = artifact.scheme
        if (
            self.recipe.effort == "quick"
            or self.recipe.rounding == "nearest"
            or (scheme and not scheme.per_channel)
        ):
            return (self.base if is_onnx else floats[artifact.format]), self.base
        rounded = self._rounded(is_pair_safe=bool(scheme and scheme.pair_safe and artifact.format == "onnx"))
        if is_onnx:
            return rounded, rounded
        try:
            lowered = lower(
                artifact.format, rounded.model(), file_digest(rounded.file), self.bench, of="rounded "
            )
        except UnsupportedError as error:
            plain = floats[artifact.format]
            note = f"weights rounded to nearest, because the rounded model cannot be lowered to {artifact.format}: {error}"
            described = replace(plain.description, notes=(*plain.description.notes, note))
            return replace(plain, description=described), self.base
        rounding = rounded.description.notes[len(self.base.description.notes) :]
        described = replace(lowered.description, notes=(*lowered.description.notes, *rounding))
        return replace(lowered, hub=rounded.file, description=described), rounded

    def _rounded(self, *, is_pair_safe: bool) -> Made:
        options = RoundOptions.of(self.recipe.options("round_weights"))
        if "damping" not in self.recipe.passes.get("round_weights", {}):
            options = replace(options, damping=DAMPING)
        order = Order(
            samples=Adapted(self.noise, self.source.model.inputs, self.base.description.inputs),
            exclude=self.recipe.exclude,
            options=replace(options, pair_safe=options.pair_safe or is_pair_safe),
        )
        artifact = Artifact("onnx-round_weights", "onnx", "fp32")
        made = optimize(artifact, self.base, order, self.noise, self.bench, by="round_weights")
        found = made.description
        notes = (*found.notes, f"these moments are of {len(self.noise)} samples of noise, not of data")
        return replace(made, origin=self.base.origin, description=replace(found, notes=notes))

    def _known(self, hub: Made, statistics: Statistics) -> Any:
        """Promised ranges with the fingerprints that their tensors have with the weights of `hub`."""
        return fingerprint(statistics.spans, observer(fold(hub.model().program))(self._sample()))

    def _sample(self) -> Mapping[str, Any]:
        adapted = Adapted(self.noise, self.source.model.inputs, self.base.description.inputs)
        return next(iter(adapted))
