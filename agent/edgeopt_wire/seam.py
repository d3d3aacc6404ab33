# SPDX-License-Identifier: Apache-2.0
"""The one plug-in loader: the folder is the registry.

Rules:
- A plug-in is a module of a package (its file name is its name) or an entry point of the group
  `edgeopt.<package's last part>` (third parties).
- Nothing is imported until it is asked for; modules whose name starts with `_` are not plug-ins.
- An unknown name is an error that lists the known ones and the nearest.
"""

import difflib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from edgeopt_wire.errors import RecipeError


def names(package: str) -> tuple[str, ...]:
    """List the plug-ins of `package` (its dotted name), sorted, ours and third parties'."""
    return tuple(sorted({*_modules(package), *_entry_points(package)}))


def load(package: str, name: str) -> ModuleType:
    """Import the plug-in `name` of `package`.

    Raises:
        RecipeError: No plug-in has this name.
    """
    if name in _modules(package):
        return importlib.import_module(f"{package}.{name}")
    entry_points = _entry_points(package)
    if name in entry_points:
        return importlib.import_module(entry_points[name].module)
    raise RecipeError(unknown(package.rpartition(".")[2].removesuffix("s"), name, names(package)))


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is no `kind`, with the nearest names first and all known ones after."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(near) for near in nearest)}?" if nearest else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known) or 'none'}"


def _modules(package: str) -> tuple[str, ...]:
    spec = importlib.util.find_spec(package)
    locations = (spec.submodule_search_locations if spec else None) or []
    return tuple(module.name for module in pkgutil.iter_modules(locations) if not module.name.startswith("_"))


def _entry_points(package: str) -> dict[str, importlib.metadata.EntryPoint]:
    group = f"edgeopt.{package.rpartition('.')[2]}"
    return {point.name: point for point in importlib.metadata.entry_points(group=group)}
