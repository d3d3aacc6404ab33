# SPDX-License-Identifier: Apache-2.0
"""The cheapest chain of converters from one model format to another.

A converter is a module of this package named <source>_to_<target>, with
- `SOURCE` and `TARGET`: two formats,
- `COST`: what a step costs, roughly its seconds for a mobile CNN; only sums of it are compared,
- `EXTRA`: the pip extra of `edgeopt` that carries its libraries, and `MODULES`: what it imports of them,
- `convert(model) -> Model`.

The list is read from the folder (and from entry points of the group `edgeopt.edgeopt_converters`), so that a new
converter needs no other line.
"""

from __future__ import annotations

import heapq
import importlib.util
import logging
from typing import Protocol, cast

from edgeopt_converters.model import Model
from edgeopt_wire import seam
from edgeopt_wire.errors import UnsupportedError

_log = logging.getLogger(__name__)
_PACKAGE = "edgeopt_converters"


class Converter(Protocol):
    """What a converter module offers; see above."""

    SOURCE: str
    TARGET: str
    COST: float
    EXTRA: str
    MODULES: tuple[str, ...]

    def convert(self, model: Model) -> Model:
        """Return the same model in `TARGET`."""
        ...


def names() -> tuple[str, ...]:
    """List the converters' names, whether or not their libraries are installed."""
    return tuple(name for name in seam.names(_PACKAGE) if "_to_" in name)


def find(source: str, target: str) -> tuple[Converter, ...]:
    """Return the cheapest chain from `source` to `target`; empty if they are the same format.

    Equal costs are decided by the converters' names, so that the same installation always answers the same.

    Raises:
        UnsupportedError: No chain leads there; the message lists the conversions that exist.
    """
    steps = {name: cast("Converter", seam.load(_PACKAGE, name)) for name in names()}
    queue: list[tuple[float, tuple[str, ...], str]] = [(0.0, (), source)]
    visited: set[str] = set()
    while queue:
        cost, chain, reached = heapq.heappop(queue)
        if reached == target:
            return tuple(steps[name] for name in chain)
        if reached in visited:
            continue
        visited.add(reached)
        for name, step in steps.items():
            if reached == step.SOURCE:
                heapq.heappush(queue, (cost + step.COST, (*chain, name), step.TARGET))
    known = ", ".join(f"{step.SOURCE} -> {step.TARGET}" for step in steps.values())
    raise UnsupportedError(f"no converters lead from {source!r} to {target!r}; there are: {known or 'none'}")


def convert(model: Model, target: str) -> Model:
    """Convert `model` into the format `target`, by way of others if need be.

    Raises:
        UnsupportedError: No chain leads there, an extra is not installed (the message says which `pip install`
            brings it), or an operator cannot be converted.
    """
    chain = find(model.format, target)
    for step in chain:
        _check_installed(step)
    for step in chain:
        _log.info("%s: converting %s to %s", model.name, step.SOURCE, step.TARGET)
        model = step.convert(model)
    return model


def _check_installed(step: Converter) -> None:
    missing = [module for module in step.MODULES if importlib.util.find_spec(module) is None]
    if missing:
        raise UnsupportedError(
            f"converting {step.SOURCE} to {step.TARGET} needs {', '.join(missing)}: "
            f"pip install 'edgeopt[{step.EXTRA}]'"
        )
