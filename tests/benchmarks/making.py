# SPDX-License-Identifier: Apache-2.0
"""Letting one peer quantize one model in a process of its own, once: what it made is kept by what went in.

What it refused is kept as well; a process that died or took too long is started anew. Quantizers run one after another,
each with the whole machine, and are told to take one thread where they ask OpenMP.
"""

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import peers
from environments import REQUIREMENTS, python_of
from models import About
from work import Outcome, Unavailable, Work

HERE = Path(__file__).resolve().parent
LIMIT_S = 300
"""A quantizer that takes longer on models of this size is told so."""

INT4 = "int4"
"""What the names of variants with 4-bit weights, or of peers that only make such, begin with."""


@dataclass(frozen=True)
class Variant:
    """One way of one peer: what a reader sees, and the runtime that its file is for (empty: as its ending says)."""

    peer: str
    name: str
    label: str
    runtime: str = ""

    @property
    def bits(self) -> int:
        """Of the weights."""
        return 4 if self.name.startswith(INT4) or self.peer.startswith(INT4) else 8


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


def variants(names: list[str], bits: Iterable[int] = ()) -> Iterator[Variant]:
    """Every way of every peer; those of 4-bit weights only where the model is tried with them."""
    for peer in names:
        module = importlib.import_module(f"peers.{peer}")
        runtimes = getattr(module, "RUNTIMES", {})
        for name, label in module.VARIANTS.items():
            found = Variant(peer, name, label, runtimes.get(name, ""))
            if found.bits in (8, *bits):
                yield found


def quantize(
    variant: Variant, about: About, calibration: Path, cache: Path, *, fresh: bool = False
) -> Outcome:
    """Give what the peer made, now or before (never before if `fresh`); an error is an outcome too."""
    key = _key(variant, about, calibration)
    folder = cache / "made" / f"{variant.peer}-{variant.name}-{key[:16]}"
    done = folder / "outcome.json"
    if not fresh and done.is_file():
        return replace(Outcome.load(done), kept=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work = Work(variant.peer, variant.name, about.files, str(calibration), str(folder), about.recipe)
    request = folder / "work.json"
    request.write_text(json.dumps(asdict(work)), encoding="utf-8")
    try:
        python = python_of(variant.peer, cache)
    except Unavailable as reason:
        return Outcome(error=str(reason))
    return _run(python, request, folder)


def _run(python: Path, request: Path, folder: Path) -> Outcome:
    """What the child says of itself, or what became of it."""
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
    outcome = replace(Outcome.load(written), process_s=time.perf_counter() - start)
    outcome.save(written)
    return outcome


def _key(variant: Variant, about: About, calibration: Path) -> str:
    """Everything that changes what comes out: samples, float files, the peer's code and versions, our own code."""
    digest = hashlib.sha256(f"{variant.peer} {variant.name}".encode())
    files = [path for form, path in about.files.items() if form != "executorch"]  # which nothing is made of
    inputs = [Path(path) for path in (*files, about.recipe) if path]
    for path in (*inputs, calibration, HERE / "peers" / f"{variant.peer}.py"):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    listed = REQUIREMENTS / f"{variant.peer}.txt"
    if listed.is_file():
        digest.update(listed.read_bytes())
    else:
        from edgeopt.artifacts import code_digest, tool_versions

        digest.update(f"{code_digest()} {tool_versions()}".encode())
    return digest.hexdigest()
