# SPDX-License-Identifier: Apache-2.0
"""Calling a user's `package.module:factory` or `file.py:factory`, with errors that say what went wrong where."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeopt_wire.errors import EdgeoptError, RecipeError


def is_factory(spec: str) -> bool:
    """Whether `spec` is a module or a Python file, a colon and a name."""
    place, colon, factory = spec.rpartition(":")
    named = place.endswith(".py") or all(part.isidentifier() for part in place.split("."))
    return bool(colon) and named and factory.isidentifier()


def call_factory(spec: str) -> Any:
    """Import the factory that `spec` names and return what it makes.

    Raises:
        RecipeError: It cannot be imported, does not exist, or fails.
    """
    factory = find_function(spec)
    try:
        return factory()
    except EdgeoptError:
        raise
    except Exception as error:
        raise RecipeError(f"{spec}() failed: {type(error).__name__}: {error}") from error


def find_function(spec: str) -> Callable[..., Any]:
    """Import what `spec` names and return the function, without calling it.

    Raises:
        RecipeError: It cannot be imported or does not exist.
    """
    if not is_factory(spec):
        raise RecipeError(f"expected package.module:factory or file.py:factory, found {spec!r}")
    place, _, name = spec.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found: Callable[..., Any] | None = getattr(module, name, None)
    if found is None or not callable(found):
        offered = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise RecipeError(f"{place} has no function {name!r}; it offers {offered or 'none'}")
    return found


def _import_module(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # what `python -m` does, and what users expect of package.module:factory
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise RecipeError(
            f"cannot import {name!r}: {type(error).__name__}: {error}. "
            "Install it, or run in its folder, or give the file as path/to/file.py:factory"
        ) from error


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise RecipeError(f"cannot import {str(path)!r}: there is no such file; looked at {path.absolute()}")
    loading = importlib.util.spec_from_file_location(path.stem, path)
    if loading is None or loading.loader is None:
        raise RecipeError(f"cannot import {str(path)!r}: Python has no loader for it")
    module = importlib.util.module_from_spec(loading)
    sys.modules.setdefault(path.stem, module)
    try:
        loading.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"cannot import {str(path)!r}: {type(error).__name__}: {error}") from error
    return module
