# SPDX-License-Identifier: Apache-2.0
"""What has to be installed for a build: a missing library is told at once, and not after minutes."""

from __future__ import annotations

import importlib.util

from edgeopt.plan import Plan
from edgeopt.sources import Source
from edgeopt_wire.errors import UnsupportedError

_NEEDED = {
    "onnx": ("onnx", "onnxruntime"),
    "litert": ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"),
    "executorch": ("torch", "executorch"),
}
"""The modules behind each format."""

_BY_WAY_OF_TORCH = {"litert": "a LiteRT", "executorch": "an ExecuTorch"}


def check_extras(plan: Plan, source: Source) -> None:
    """Refuse at once what would fail after minutes: a format or a runtime whose libraries are not installed.

    Raises:
        UnsupportedError: An extra is missing; the message says which to install.
    """
    for name in plan.formats:
        missing = [module for module in _NEEDED[name] if not _is_installed(module)]
        if missing:
            called = _BY_WAY_OF_TORCH.get(name)
            why = f" ({called} model is made by way of PyTorch)" if called else ""
            raise UnsupportedError(
                f"{plan.device.id} takes {name} models{why} and {', '.join(missing)} is not installed: "
                f"pip install 'edgeopt[{name}]'"
            )
    for name in dict.fromkeys(artifact.made_for for artifact in plan.artifacts if artifact.made_for):
        if not _is_installed(name):
            raise UnsupportedError(
                f"files for {name} are validated and measured in it, and it is not installed: "
                f"pip install 'edgeopt[{name}]', or leave it out of the recipe's `runtimes`"
            )
    if source.model.format == "torch" and not _is_installed("onnxscript"):
        raise UnsupportedError("a PyTorch model needs onnxscript: pip install 'edgeopt[torch]'")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
