# SPDX-License-Identifier: Apache-2.0
"""Inference runtimes, one module each; the module's name is the `runtime` of a variant.

A runtime module offers:
- `version() -> str`: the installed library's version; raises `UnsupportedError` that names what to install.
- `accelerators() -> tuple[str, ...]`: what it can use here, e.g. ("cpu",) or ("cpu", "tensorrt").
- `load(file: Path, variant: Variant) -> Session`: ready to run, or `UnsupportedError` / `RuntimeFailure`. It never
  falls back: an accelerator that is not here is refused.

The library itself is imported inside these functions: an agent without a model holds no numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


class Session(Protocol):
    """A loaded variant. Tensors are the variant's own (its dtype and layout), by name, batch axis included."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one inference; raises `RuntimeFailure` if the library fails."""
        ...

    def close(self) -> None:
        """Release the library's memory. Calling it twice is harmless."""
        ...
