# SPDX-License-Identifier: Apache-2.0
"""What a user hands over, turned into a `Source`. One module a kind of source.

A source module offers `matches(spec) -> bool` and `load(spec, recipe) -> Source`. The first module, in the order of
their names, that matches takes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeopt.recipe import Recipe
from edgeopt_converters.model import Model
from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError


@dataclass(frozen=True)
class Source:
    """A loaded model with what it says about itself. `sha256` digests its weights and its graph."""

    model: Model
    sha256: str
    description: str
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


def load_source(spec: str, recipe: Recipe) -> Source:
    """Load the model that `spec` names.

    Raises:
        RecipeError: No kind of source knows `spec`, or the model cannot be loaded.
    """
    for name in seam.names(__name__):
        module = seam.load(__name__, name)
        if module.matches(spec):
            source: Source = module.load(spec, recipe)
            return source
    raise RecipeError(
        f"cannot tell what {spec!r} is; expected package.module:factory, file.py:factory, a .pt2 or an .onnx file"
    )


def existing_file(spec: str, what: str) -> Path:
    """Return the path of a file that exists.

    Raises:
        RecipeError: It does not.
    """
    path = Path(spec)
    if not path.is_file():
        raise RecipeError(f"{what} {spec!r} is not a file here; looked at {path.absolute()}")
    return path


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_name(text: str) -> str:
    """Make a package name of a file's or factory's name: lower case, `-` for what a name may not hold."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in text.lower())
    return kept.strip("-.") or "model"
