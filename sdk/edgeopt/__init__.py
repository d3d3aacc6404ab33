# SPDX-License-Identifier: Apache-2.0
"""edgeopt: from a trained model to a small, signed, measured model on every device of a fleet.

The names below are the public API. Nothing here imports a framework: that is left to the functions that need one.
"""

from edgeopt.budget import Budget
from edgeopt.build import BuildOutcome, build
from edgeopt.cache import Cache
from edgeopt.calibrate import Calibration
from edgeopt.measure import measure
from edgeopt.progress import Progress
from edgeopt.recipe import Recipe, load_recipe
from edgeopt.request import BuildRequest
from edgeopt.sources.torch_factory import TorchModel
from edgeopt.suiting import plan_build
from edgeopt_wire import __version__
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.measurement import Measurement

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
]
