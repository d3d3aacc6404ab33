# SPDX-License-Identifier: Apache-2.0
"""When what was measured counts no more: another power mode, governor, kernel or runtime library than then.

Rule: looking costs no library: versions are read from what pip installed, the rest from /proc and /sys.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

from edgeopt_agent.conditions import ROOT, Ask, ask, read_board

CHECK_S = 600.0
"""Seconds between two looks."""

DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-qnn"),
    "litert": ("ai-edge-litert", "tflite-runtime", "tensorflow"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "tensorrt": ("tensorrt",),
}
"""What a runtime may be installed as."""


def conditions(runtimes: Iterable[str], root: Path = ROOT, ask: Ask = ask) -> str:
    """What a measurement with these runtimes depends on, as one line."""
    board = read_board(root, ask=ask)
    found = [board.os, f"power mode {board.power_mode or '-'}", f"governor {board.governor or '-'}"]
    for runtime in sorted(set(runtimes)):
        for name in DISTRIBUTIONS.get(runtime, ()):
            try:
                found.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                continue
    return "; ".join(found)


def changes(before: str, after: str) -> str:
    """Say what is different now."""
    old, new = set(before.split("; ")), set(after.split("; "))
    return f"{', '.join(sorted(new - old)) or 'something is gone'} instead of {', '.join(sorted(old - new)) or 'nothing'}"
