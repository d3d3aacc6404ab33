# SPDX-License-Identifier: Apache-2.0
"""What a user can set about quantization-aware training."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

LOSSES = ("auto", "mse", "kl")
WHEN = ("auto", "always", "never")


@dataclass(frozen=True)
class Training:
    """A recipe's `[train]`: whether a build trains its int8 files, on what, and for how long.

    `when` is always where the recipe has the table, or `train = true`. auto trains with the extensive effort where int8
    does not keep `--max-drop`. `data` is taught beside the calibration samples, at most `samples` of it. `minutes` bound
    each training; what they do not hold is a shorter schedule, not one that is cut off. `label_weight` is the share of
    the loss that is the cross entropy of class labels; with 0 the float model alone teaches, and labels are not needed.
    """

    when: str = "auto"
    data: str = ""
    samples: int = 2048
    minutes: float = 15.0
    label_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.when not in WHEN:
            raise RecipeError(f"[train]: {seam.unknown('when', self.when, WHEN)}")
        if self.samples < 1 or self.minutes <= 0 or not 0 <= self.label_weight <= 1:
            raise RecipeError(
                "[train]: samples and minutes must be positive and label_weight 0 to 1, found "
                f"{self.samples}, {self.minutes} and {self.label_weight}"
            )


@dataclass(frozen=True)
class Options:
    """How long and how fast, and on what.

    `steps` optimizer steps of `batch` samples each; Adam with a cosine to zero from `rate` for weights and `range_rate`
    for steps and zero points. Batch statistics act for the first `learn_statistics` share of the steps, then they are
    frozen. `samples` is how many are held in memory, `held_out` the share of them that judges and never teaches.
    Every `save_every` steps (0: a tenth of the schedule) the held-out loss is taken and everything is saved, and every `save_seconds` everything is
    saved: a killed run loses no more than that. `max_seconds`, runs that were cut off included, shortens the schedule
    where all steps do not fit. `segments` above 1 recomputes activations in
    the backward pass in that many parts: less memory, a third more time (Chen et al. 2016).
    `weight_bits` is 2 to 8. `loss` auto is the squared error of every output over its variance, plus the
    Kullback-Leibler divergence where an output is a row of scores. `labels` are class indices of the samples in their
    order; with them, `label_weight` of the loss is their cross entropy.
    """

    steps: int = 400
    batch: int = 16
    rate: float = 1e-4
    range_rate: float = 1e-3
    learn_statistics: float = 0.0
    samples: int = 2048
    held_out: float = 0.15
    save_every: int = 0
    save_seconds: float = 20.0
    max_seconds: float = 3600.0
    segments: int = 1
    weight_bits: int = 8
    loss: str = "auto"
    labels: tuple[int, ...] = ()
    label_weight: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise RecipeError(seam.unknown("training loss", self.loss, LOSSES))
        for name in (
            "steps",
            "batch",
            "segments",
            "save_seconds",
            "max_seconds",
            "rate",
            "range_rate",
        ):
            if not getattr(self, name) > 0:
                raise RecipeError(
                    f"quantize_aware_training: {name} must be positive, found {getattr(self, name)}"
                )
        if self.save_every < 0:
            raise RecipeError(
                f"quantize_aware_training: save_every must not be negative, found {self.save_every}"
            )
        for name in ("learn_statistics", "label_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(
                    f"quantize_aware_training: {name} must be 0 to 1, found {getattr(self, name)}"
                )
        if not 0 < self.held_out < 1 or self.samples < 4:
            raise RecipeError(
                "quantize_aware_training: held_out must lie between 0 and 1 and samples be at least 4, "
                f"found {self.held_out} and {self.samples}"
            )
        if not 2 <= self.weight_bits <= 8:
            raise RecipeError(
                f"quantize_aware_training: weight_bits must be 2 to 8, found {self.weight_bits}"
            )
