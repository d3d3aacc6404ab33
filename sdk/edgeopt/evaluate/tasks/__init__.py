# SPDX-License-Identifier: Apache-2.0
"""Tasks: what a good answer is, one module each; a recipe's `[evaluate] task` names one.

A task offers `Options`, a frozen dataclass whose fields have defaults and which `[evaluate.options]` fills, and
`score(outputs, baseline, options) -> Scores`. `baseline` is what the unmodified model says of the same samples (the
baseline itself is scored with `outputs` and `baseline` the same); most tasks look at the labels only. Outputs or labels
that do not fit are a RecipeError that says what was expected and found. Which scores there are depends on the labels
and shapes only, so that a candidate has those of the baseline. A task may offer `check(options)`, which looks
at what the options name (a user's function) before anything long begins. A user's own function is the task `custom`, or
`task = "module:function"` for short.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgeopt.factory import is_factory
from edgeopt_wire import seam
from edgeopt_wire.document import from_json
from edgeopt_wire.errors import DocumentError, RecipeError

if TYPE_CHECKING:
    from edgeopt.evaluate.outputs import Outputs
    from edgeopt.evaluate.scores import Scores

PACKAGE = "edgeopt.evaluate.tasks"


class _Module(Protocol):
    Options: type[object]

    def score(self, outputs: Outputs, baseline: Outputs, options: object) -> Scores: ...


@dataclass(frozen=True)
class Task:
    """A task with its options, ready to score."""

    name: str
    module: _Module
    options: object

    def score(self, outputs: Outputs, baseline: Outputs) -> Scores:
        """Score one model's outputs.

        Raises:
            RecipeError: The outputs or labels are not such as the task expects.
        """
        return self.module.score(outputs, baseline, self.options)


def load_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Load the task that a recipe names, or a user's `module:function`, and check its options.

    Raises:
        RecipeError: There is no such task or option, or an option has another type.
    """
    given = dict(options or {})
    if is_factory(name):
        name, given = "custom", {"function": name, **given}
    module = cast("_Module", seam.load(PACKAGE, name))
    where = f"[evaluate.options] of the task {name!r}"
    known = {entry.name for entry in dataclasses.fields(cast("Any", module.Options))}
    for key in given:
        if key not in known:
            raise RecipeError(f"{where}: {seam.unknown('option', key, known)}")
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    try:
        task = Task(name, module, from_json(module.Options, plain, where))
    except DocumentError as error:
        raise RecipeError(str(error)) from error
    getattr(module, "check", lambda _: None)(task.options)
    return task
