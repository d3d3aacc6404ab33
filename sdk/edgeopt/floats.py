# SPDX-License-Identifier: Apache-2.0
"""The float models that artifacts are made from, each lowered to its format when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy

from edgeopt.artifacts import Made, lower
from edgeopt.plan import Plan
from edgeopt.sources import Source
from edgeopt.workbench import Workbench


class Floats(Mapping[str, Made]):
    """Format -> the source in it. Those that a plan measures are lowered at once, so that what cannot be fails early.

    An int8 file of a format that takes its weights from the ONNX form needs none of its own.

    Raises:
        UnsupportedError: An operator of the model does not exist in a format; also when a format is asked for.
    """

    def __init__(self, plan: Plan, source: Source, bench: Workbench) -> None:
        self._source, self._bench = source, bench
        self._formats = plan.formats
        self._lowered: dict[str, Made] = {}
        self._instead: dict[str, Made] = {}
        for artifact in plan.artifacts:
            if not artifact.pass_name:
                self[artifact.format]

    def but(self, name: str, made: Made) -> Floats:
        """The same with another model in one format."""
        found = copy(self)
        found._instead = {**self._instead, name: made}  # noqa: SLF001 - its own
        return found

    def __getitem__(self, name: str) -> Made:
        if name not in self._formats:
            raise KeyError(name)
        if name in self._instead:
            return self._instead[name]
        if name not in self._lowered:
            self._lowered[name] = lower(name, self._source.model, self._source.sha256, self._bench)
        return self._lowered[name]

    def __contains__(self, name: object) -> bool:
        return name in self._formats

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)
