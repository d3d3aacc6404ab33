# SPDX-License-Identifier: Apache-2.0
"""Letting one peer quantize one model in a process of its own, once: what it made is kept by what went in."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import peers
from environments import REQUIREMENTS, python_of
from models import About
from work import NOT_APPLICABLE, Outcome, Unavailable, Work

HERE = Path(__file__).resolve().parent
LIMIT_S = 1500
"""A quantizer that takes longer on the smallest devices' models is told so."""

INT4 = "int4"
"""What the names of variants with 4-bit weights begin with."""


def peers_of(asked: str) -> list[str]:
    """The peers that are asked for, ours first.

    Raises:
        SystemExit: One is not known.
    """
    known = sorted(
        (info.name for info in pkgutil.iter_modules(peers.__path__)), key=lambda name: (name != "ours", name)
    )
    names = known if asked == "all" else asked.split(",")
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"no peer {unknown[0]!r}; known: {', '.join(known)}")
    return names


def variants(names: list[str], bits: Iterable[int] = ()) -> Iterator[tuple[str, str, str]]:
    """Peer, variant, and what a reader sees; variants of 4-bit weights only where the model is tried with them."""
    for name in names:
        for variant, label in importlib.import_module(f"peers.{name}").VARIANTS.items():
            if not variant.startswith(INT4) or 4 in bits:
                yield name, variant, label


def quantize(peer: str, variant: str, about: About, calibration: Path, cache: Path) -> Outcome:
    """Give what the peer made, now or before; an error is an outcome too."""
    key = _key(peer, variant, about, calibration)
    folder = cache / "made" / f"{peer}-{variant}-{key[:16]}"
    done = folder / "outcome.json"
    if not _is_kept(done):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        work = Work(peer, variant, about.files, str(calibration), str(folder), about.recipe)
        request = folder / "work.json"
        request.write_text(json.dumps(asdict(work)), encoding="utf-8")
        try:
            python = python_of(peer, cache)
        except Unavailable as reason:
            return Outcome(error=str(reason))
        outcome = _run(python, request, folder)
        if outcome is not None:
            return outcome
    return Outcome.load(done)


def _is_kept(done: Path) -> bool:
    """A file that was made is kept, and so is that a peer does not apply; what failed is tried again."""
    if not done.is_file():
        return False
    outcome = Outcome.load(done)
    return not outcome.error or outcome.error.startswith(NOT_APPLICABLE)


def _run(python: Path, request: Path, folder: Path) -> Outcome | None:
    """None where the child answered for itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    start = time.perf_counter()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        try:
            code = subprocess.run(
                [str(python), str(HERE / "child.py"), str(request)],
                stdout=log, stderr=log, timeout=LIMIT_S, check=False, env=environment, cwd=folder,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return Outcome(error=f"not done within {LIMIT_S} s")
    written = folder / "outcome.json"
    if not written.is_file():
        return Outcome(error=f"its process ended with {code}; see {folder / 'log.txt'}")
    replace(Outcome.load(written), process_s=time.perf_counter() - start).save(written)
    return None


def _key(peer: str, variant: str, about: About, calibration: Path) -> str:
    """Everything that changes what comes out: samples, float files, the peer's code and versions, our own code."""
    digest = hashlib.sha256(f"{peer} {variant}".encode())
    inputs = [Path(path) for path in (*about.files.values(), about.recipe) if path]
    for path in (*inputs, calibration, HERE / "peers" / f"{peer}.py"):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    listed = REQUIREMENTS / f"{peer}.txt"
    if listed.is_file():
        digest.update(listed.read_bytes())
    else:
        from edgeopt.artifacts import code_digest, tool_versions

        digest.update(f"{code_digest()} {tool_versions()}".encode())
    return digest.hexdigest()
