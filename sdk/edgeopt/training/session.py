# SPDX-License-Identifier: Apache-2.0
"""The training loop: it can be killed at any moment and goes on as if it had not been.

Rules:
- Everything that the next step depends on is in the checkpoint: weights, grids, running statistics, Adam's moments,
  the schedule, the random state, the position in the data, the best so far. On a CPU with the same number of threads
  a resumed run gives the same bits as one that was never cut off.
- The order of the samples depends on the seed and the epoch alone.
- What is kept is the state with the least loss on samples that never taught, where it began included.
- A loss that is `MUCH` above the best, or above it `PATIENCE` times in a row, sends training back to the best state at
  `BACK` of the rates: near the optimum, where rounding to second moments leaves a net, a rate that is right elsewhere
  only makes noise.
- Where all steps do not fit into the time, the first few say how many do, and the rates fall to zero over those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from edgeopt.training import checkpoint
from edgeopt.training.graphs import flat
from edgeopt.training.held_out import split
from edgeopt.training.losses import distance, label_error
from edgeopt.training.options import Options
from edgeopt.training.segments import in_segments
from edgeopt.training.student import Student
from edgeopt_wire.errors import RecipeError

Tensors = tuple[torch.Tensor, ...]

BACK, MUCH, PATIENCE = 0.25, 1.3, 3
"""What is left of the rates after a step back, and what leads to one."""

JUDGEMENTS = 10
"""How often a run is judged on held-out samples, where the options leave it open."""

PACING_STEPS = 3
"""Steps after which the pace of a run is known: the first allocates, the next two are alike."""

PACE_SHARE = 0.9
"""Of the time that is left, what steps may take; the rest is for judging and for a machine that slows down."""

TEACHER_BYTES = 256 * 2**20
"""What the teacher says of a sample never changes; so much of it is kept instead of computed again."""


@dataclass(frozen=True)
class Lessons:
    """Flat inputs of every sample (batch 1), their labels or none, and which outputs are probabilities."""

    samples: Sequence[Tensors]
    labels: Sequence[int]
    are_shares: Sequence[bool]
    is_batchable: bool

    def __post_init__(self) -> None:
        if self.labels and len(self.labels) < len(self.samples):
            raise RecipeError(
                f"quantize_aware_training: {len(self.labels)} labels for {len(self.samples)} samples; give one each"
            )


@dataclass(frozen=True)
class Desk:
    """Where a run keeps itself and under which name, who is told of every step, and the clock in seconds."""

    path: Path | None = None
    identity: str = ""
    on_step: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class Outcome:
    """How a run went. Losses are on held-out samples; `ending` says why it stopped."""

    steps: int
    first_loss: float
    best_loss: float
    best_step: int
    seconds: float
    ending: str


class Session:
    """One run. `student` ends with the best weights and grids that were found."""

    def __init__(
        self, student: Student, teacher: fx.GraphModule, lessons: Lessons, options: Options, desk: Desk
    ) -> None:
        self._student, self._teacher, self._lessons = student, teacher, lessons
        self._options, self._desk = options, desk
        self._step, self._elapsed, self._saved_at = 0, 0.0, -math.inf
        self._steps, self._is_paced = options.steps, False
        self._gain, self._worse = 1.0, 0
        self._told: dict[int, Tensors] = {}
        self._told_bytes = 0
        self._runner = in_segments(student.graph, options.segments) if options.segments > 1 else student.graph
        self._taught, self._judging = split(len(lessons.samples), options.held_out)
        grids = [
            parameter for name, parameter in student.graph.named_parameters() if _is_of_grid(name, parameter)
        ]
        weights = [
            parameter for name, parameter in student.graph.named_parameters() if _is_weight(name, parameter)
        ]
        self._optimizer = torch.optim.Adam(
            [{"params": weights, "lr": options.rate}, {"params": grids, "lr": options.range_rate}]
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._factor)
        self._best: dict[str, torch.Tensor] = {}
        self._best_loss, self._best_step, self._first_loss = math.inf, 0, math.inf

    def resume(self) -> bool:
        """Go on from the checkpoint of this very run; False where there is none."""
        desk = self._desk
        state = checkpoint.load(desk.path, desk.identity) if desk.path is not None else None
        if state is None:
            return False
        self._student.graph.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        self._step, self._elapsed = state["step"], state["elapsed"]
        self._steps, self._is_paced = state["steps"], state["is_paced"]
        self._gain, self._worse = state["gain"], state["worse"]
        self._best, self._best_loss, self._best_step = state["best"], state["best_loss"], state["best_step"]
        self._first_loss = state["first_loss"]
        for _ in range(self._step):
            desk.on_step()
        return True

    def run(self) -> Outcome:
        """Train to the end of the schedule or of the time, and leave the best state in the student."""
        begun = self._desk.clock() - self._elapsed
        self._student.switch(is_on=True)
        ending = ""
        if self._step == 0:
            self._judge()
            self._first_loss = self._best_loss
        while self._step < self._steps:
            if not self._learn():
                ending = f"the loss was no number any more at step {self._step}; a lower rate may help"
                break
            self._desk.on_step()
            self._elapsed = self._desk.clock() - begun
            self._pace()
            is_late = self._elapsed >= self._options.max_seconds
            every = self._options.save_every or max(1, self._steps // JUDGEMENTS)
            if is_late or self._step % every == 0 or self._step == self._steps:
                self._judge()
                self._save()
            elif self._elapsed - self._saved_at >= self._options.save_seconds:
                self._save()
            if is_late and self._step < self._steps:
                ending = f"the time was up ({self._options.max_seconds:g} s)"
                break
        self._student.graph.load_state_dict(self._best)
        self._student.graph.eval()
        if self._desk.path is not None:
            self._desk.path.unlink(missing_ok=True)
        return Outcome(
            self._step,
            self._first_loss,
            self._best_loss,
            self._best_step,
            self._elapsed,
            ending or self._said(),
        )

    def _said(self) -> str:
        options = self._options
        if self._steps == options.steps:
            return "every step was made"
        return f"of {options.steps} steps, so many fit into {options.max_seconds:g} s"

    def _learn(self) -> bool:
        """Make one step; False where the loss or a gradient is not finite, and nothing was changed."""
        self._student.graph.train()
        if self._step >= self._options.learn_statistics * self._steps or not self._lessons.is_batchable:
            self._student.freeze()
        chosen = batch(self._taught, self._step, self._options)
        groups = [chosen] if self._lessons.is_batchable else [[number] for number in chosen]
        self._optimizer.zero_grad(set_to_none=True)
        for group in groups:
            (self._loss(group, self._runner) * (len(group) / len(chosen))).backward()
        norm = torch.nn.utils.clip_grad_norm_(
            [parameter for part in self._optimizer.param_groups for parameter in part["params"]], math.inf
        )
        if not bool(torch.isfinite(norm)):
            return False
        self._optimizer.step()
        self._schedule.step()
        self._student.settle()
        self._step += 1
        return True

    def _pace(self) -> None:
        """After the first steps, once: shorten the schedule to what fits into the time."""
        if self._is_paced or self._step < PACING_STEPS:
            return
        self._is_paced = True
        left = PACE_SHARE * (self._options.max_seconds - self._elapsed)
        fits = self._step + max(1, int(left * self._step / max(self._elapsed, 1e-9)))
        if fits < self._steps:
            self._steps = fits
            self._save()

    def _wanted(self, number: int) -> Tensors:
        """What the teacher says of one sample; by itself, so that it is the same bits in every batch."""
        if number in self._told:
            return self._told[number]
        with torch.no_grad():
            found = flat(self._teacher(*self._lessons.samples[number]))
        size = sum(output.numel() * output.element_size() for output in found)
        if self._told_bytes + size <= TEACHER_BYTES:
            self._told[number] = found
            self._told_bytes += size
        return found

    def _loss(self, numbers: Sequence[int], graph: fx.GraphModule) -> torch.Tensor:
        lessons, options = self._lessons, self._options
        inputs = [
            torch.cat(parts) for parts in zip(*(lessons.samples[number] for number in numbers), strict=True)
        ]
        told = zip(*(self._wanted(number) for number in numbers), strict=True)
        wanted = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in told]
        found = flat(graph(*inputs))
        loss = distance(found, wanted, loss=options.loss, are_shares=lessons.are_shares)
        if lessons.labels:
            labels = torch.tensor([lessons.labels[number] for number in numbers])
            error = label_error(found[0], labels, is_share=lessons.are_shares[0])
            loss = (1 - options.label_weight) * loss + options.label_weight * error
        return loss

    def _judge(self) -> None:
        """Take the held-out loss, and keep the state if it is the best, or go back to what was."""
        self._student.graph.eval()
        size = self._options.batch if self._lessons.is_batchable else 1
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(self._judging), size):
                group = self._judging[start : start + size]
                total += float(self._loss(group, self._student.graph)) * len(group)
        loss = total / len(self._judging)
        if loss < self._best_loss or not self._best:
            self._best_loss, self._best_step = loss, self._step
            self._best = {
                name: values.detach().clone() for name, values in self._student.graph.state_dict().items()
            }
            self._worse = 0
            return
        self._worse += 1
        if self._worse >= PATIENCE or not loss <= MUCH * self._best_loss:
            self._go_back()

    def _go_back(self) -> None:
        """Begin again from the best state, more carefully."""
        self._student.graph.load_state_dict(self._best)
        self._optimizer.state.clear()
        self._gain *= BACK
        self._worse = 0
        for group, rate in zip(self._optimizer.param_groups, self._schedule.base_lrs, strict=True):
            group["lr"] = rate * self._factor(self._step)

    def _save(self) -> None:
        self._saved_at = self._elapsed
        if self._desk.path is None:
            return
        state: dict[str, Any] = {
            "model": self._student.graph.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "random": torch.get_rng_state(),
            "step": self._step,
            "elapsed": self._elapsed,
            "steps": self._steps,
            "is_paced": self._is_paced,
            "gain": self._gain,
            "worse": self._worse,
            "best": self._best,
            "best_loss": self._best_loss,
            "best_step": self._best_step,
            "first_loss": self._first_loss,
        }
        checkpoint.save(self._desk.path, self._desk.identity, state)

    def _factor(self, step: int) -> float:
        """Return the cosine from 1 to 0 over all steps, times what steps back left of it."""
        return self._gain * 0.5 * (1 + math.cos(math.pi * min(step / self._steps, 1.0)))


def batch(taught: Sequence[int], step: int, options: Options) -> list[int]:
    """Return the samples of one step: epoch after epoch, each in an order of its own."""
    size = min(options.batch, len(taught))
    first = step * size
    chosen: list[int] = []
    while len(chosen) < size:
        epoch, at = divmod(first + len(chosen), len(taught))
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        order = torch.randperm(len(taught), generator=generator).tolist()
        chosen.extend(taught[number] for number in order[at : at + size - len(chosen)])
    return chosen


def _is_of_grid(name: str, parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad and name.rpartition(".")[2] in ("change", "zero_change")


def _is_weight(name: str, parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad and not _is_of_grid(name, parameter)
