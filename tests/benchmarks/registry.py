# SPDX-License-Identifier: Apache-2.0
"""The models by name, each prepared once in a process of its own and kept.

`python registry.py NAME FOLDER CACHE` is that process.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import models
from models import ABOUT, About, Place
from work import Unavailable

LIMIT_S = 1200
"""Training a small model on one core takes minutes; more is a fault."""

STAMP = "made-by"
"""Beside a prepared model: the digest of the modules that made it."""

HELPERS = ("paragraphs", "pictures")
"""Modules that make data for families."""

QUICK = ("efficientnet-lite0", "resnet8", "keyword-spotter")
"""What `make bench` runs without arguments."""


def families() -> dict[str, str]:
    """Model name -> module."""
    found = [info.name for info in pkgutil.iter_modules(models.__path__)]
    return {name: module for module in found for name in importlib.import_module(f"models.{module}").NAMES}


def prepared(name: str, cache: Path) -> tuple[Path, About]:
    """The folder of a model, prepared now or before.

    Raises:
        Unavailable: It cannot be had on this machine.
    """
    if name not in families():
        raise Unavailable(f"no model {name!r}; known: {', '.join(families())}")
    folder = cache / "models" / name
    if not _is_ready(folder, name):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [sys.executable, str(Path(__file__).resolve()), name, str(folder), str(cache)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment
        )
        if done.returncode:
            raise Unavailable((done.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    return folder, About.load(folder)


def _is_ready(folder: Path, name: str) -> bool:
    """Whether it was prepared by the code that is here now."""
    stamp = folder / STAMP
    return (
        (folder / ABOUT).is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == _digest(name)
    )


def _digest(name: str) -> str:
    here = Path(__file__).parent
    source = (Path(models.__path__[0]) / f"{families()[name]}.py").read_bytes()
    used = [here / f"{helper}.py" for helper in HELPERS if f"from {helper} import".encode() in source]
    shared = Path(models.__path__[0]) / "__init__.py"
    return hashlib.sha256(b"".join((source, *(file.read_bytes() for file in (shared, *used))))).hexdigest()


def main() -> None:
    """Prepare one model."""
    name, folder, cache = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    family = importlib.import_module(f"models.{families()[name]}")
    (folder / STAMP).write_text(_digest(name), encoding="utf-8")
    try:
        family.prepare(Place(name, folder, cache)).save(folder)
    except Unavailable as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
