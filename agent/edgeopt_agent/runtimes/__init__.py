# SPDX-License-Identifier: Apache-2.0
"""Inference runtimes, one module each; the module's name is the `runtime` of a variant.

A runtime module offers:
- `version() -> str`: the installed library's version; raises `UnsupportedError` that names what to install.
- `accelerators() -> tuple[str, ...]`: what it can use here, e.g. ("cpu",) or ("cpu", "tensorrt").
- `load(file: Path, variant: Variant) -> Session`: ready to run, or `UnsupportedError` / `RuntimeFailure`. It never
  falls back: an accelerator that is not here, an option that it does not know and a library that is older than
  `minimum_runtime` are refused (`check_variant` says so in one place).

The library itself is imported inside these functions: an agent without a model holds no numpy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from edgeopt_wire import seam
from edgeopt_wire.errors import UnsupportedError
from edgeopt_wire.manifest import Variant

if TYPE_CHECKING:
    import numpy as np


class Session(Protocol):
    """A loaded variant. Tensors are the variant's own (its dtype and layout), by name, batch axis included.

    One whose class says `is_reentrant = True` may be run by several threads at once.
    """

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one inference; raises `RuntimeFailure` if the library fails."""
        ...

    def close(self) -> None:
        """Release the library's memory. Calling it twice is harmless."""
        ...


class Runtime(Protocol):
    """What a runtime module offers; see above."""

    def version(self) -> str:
        """Return the installed library's version."""
        ...

    def accelerators(self) -> tuple[str, ...]:
        """Return what the library can use on this machine; "cpu" is always first."""
        ...

    def load(self, file: Path, variant: Variant) -> Session:
        """Load `file`, which is `variant`'s."""
        ...


def names() -> tuple[str, ...]:
    """List the runtimes that this agent knows, whether or not their library is installed."""
    return seam.names(__name__)


def find(name: str) -> Runtime:
    """Return the runtime called `name`.

    Raises:
        UnsupportedError: This agent does not know it.
    """
    if name not in names():
        raise UnsupportedError(seam.unknown("runtime", name, names()))
    return cast("Runtime", seam.load(__name__, name))


def check_variant(
    variant: Variant,
    *,
    version: str,
    accelerators: Sequence[str],
    options: Mapping[str, Sequence[str]],
) -> None:
    """Refuse a variant that this machine cannot run as asked.

    `options` maps each known option to its allowed values; no values means that any text is allowed.

    Raises:
        UnsupportedError: The library is too old, the accelerator is not here, or an option is unknown.
    """
    where = f"variant {variant.id} ({variant.runtime} {version})"
    if variant.minimum_runtime and _numbers(version) < _numbers(variant.minimum_runtime):
        raise UnsupportedError(
            f"{where} needs {variant.runtime} {variant.minimum_runtime} or newer; upgrade it on this device"
        )
    if variant.accelerator not in accelerators:
        raise UnsupportedError(
            f"{where} asks for the accelerator {variant.accelerator!r}; "
            f"this machine's {variant.runtime} offers {', '.join(accelerators)}"
        )
    for name, value in variant.options.items():
        if name not in options:
            raise UnsupportedError(f"{where}: {seam.unknown('option', name, options)}")
        if options[name] and value not in options[name]:
            raise UnsupportedError(
                f"{where}: option {name!r} must be one of {', '.join(options[name])}, found {value!r}"
            )


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version; what follows (`rc1`, `+cu12`) does not order releases here."""
    found = re.match(r"\d+(\.\d+)*", version)
    if found is None:
        raise UnsupportedError(f"{version!r} is not a version that begins with a number")
    return tuple(int(part) for part in found.group().split("."))
