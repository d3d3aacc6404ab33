# SPDX-License-Identifier: Apache-2.0
"""edgeopt: from a trained model to a small, signed, measured model on every device of a fleet.

The names below are the public API; each is imported when it is first used, so that `import edgeopt` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgeopt_wire import __version__

if TYPE_CHECKING:
    from edgeopt.budget import Budget
    from edgeopt.build import BuildOutcome, BuildRequest, build, plan_build
    from edgeopt.cache import Cache
    from edgeopt.calibrate import Calibration
    from edgeopt.measure import measure
    from edgeopt.progress import Progress
    from edgeopt.publish import publish
    from edgeopt.recipe import Recipe, load_recipe
    from edgeopt.sources.torch_factory import TorchModel
    from edgeopt_wire.manifest import Manifest
    from edgeopt_wire.measurement import Measurement

_HOMES = {
    "Budget": "edgeopt.budget",
    "BuildOutcome": "edgeopt.build",
    "BuildRequest": "edgeopt.build",
    "Cache": "edgeopt.cache",
    "Calibration": "edgeopt.calibrate",
    "Manifest": "edgeopt_wire.manifest",
    "Measurement": "edgeopt_wire.measurement",
    "Progress": "edgeopt.progress",
    "Recipe": "edgeopt.recipe",
    "TorchModel": "edgeopt.sources.torch_factory",
    "build": "edgeopt.build",
    "load_recipe": "edgeopt.recipe",
    "measure": "edgeopt.measure",
    "plan_build": "edgeopt.build",
    "publish": "edgeopt.publish",
}

__all__ = [
    "Budget",
    "BuildOutcome",
    "BuildRequest",
    "Cache",
    "Calibration",
    "Manifest",
    "Measurement",
    "Progress",
    "Recipe",
    "TorchModel",
    "__version__",
    "build",
    "load_recipe",
    "measure",
    "plan_build",
    "publish",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
