# SPDX-License-Identifier: Apache-2.0
"""Whether a package fits this machine, judged from its signed index before a byte of it is fetched.

Rules:
- What cannot be told here (the memory of an odd kernel, runtimes when no process can be made) refuses nothing: the probe
  decides. What can be told and does not fit is final.
- A stand-in skips the architecture, and nothing else.
- Runtimes are asked for their version in a child process: a vendor's library may crash, and an agent that serves
  nothing holds none of them in memory.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgeopt_agent.conditions import architecture
from edgeopt_agent.config import AgentConfig
from edgeopt_wire.errors import UnsupportedError
from edgeopt_wire.index import PackageIndex

_log = logging.getLogger(__name__)

ASK_TIMEOUT_S = 60.0
"""Importing a large runtime from a slow SD card."""

Versions = Callable[["tuple[str, ...]"], "Mapping[str, str] | None"]
"""Gives the installed runtimes among these with their versions, None if that cannot be told now."""


@dataclass(frozen=True)
class Machine:
    """What this machine has. `memory_mib` is of the machine or of the agent's control group, None if not known."""

    architecture: str
    memory_mib: int | None
    disk_bytes: int
    versions: Versions


def this_machine(state_dir: Path, root: Path = Path("/")) -> Machine:
    """Read what this machine has; `state_dir` is where packages go."""
    return Machine(architecture(), _memory_mib(root), shutil.disk_usage(state_dir).total, installed_runtimes)


def check_fits(index: PackageIndex, config: AgentConfig, machine: Machine) -> None:
    """Refuse a package that this machine cannot run.

    Raises:
        UnsupportedError: It is for something else, or needs more than is here.
    """
    why = (
        _other_class(index, config)
        or _other_architecture(index, config, machine)
        or _too_large(index, machine)
        or _no_runtime(index, machine)
    )
    if why:
        raise UnsupportedError(f"{index.name} {index.version} {why}; nothing was fetched")


def _other_class(index: PackageIndex, config: AgentConfig) -> str:
    classes = index.compatible.device_classes
    if config.device_class == index.device or config.device_class in classes:
        return ""
    return f"is a package for {', '.join(classes) or index.device}, this device is a {config.device_class}"


def _other_architecture(index: PackageIndex, config: AgentConfig, machine: Machine) -> str:
    wanted = index.compatible.architectures
    if not wanted or machine.architecture in wanted or config.stand_in:
        return ""
    return f"is built for {', '.join(wanted)}, this machine is {machine.architecture}"


def _too_large(index: PackageIndex, machine: Machine) -> str:
    wanted = index.compatible
    if machine.memory_mib is not None and wanted.memory_mib > machine.memory_mib:
        return f"needs {wanted.memory_mib} MiB of memory, this machine has {machine.memory_mib} MiB for it"
    if wanted.disk_bytes > machine.disk_bytes:
        return f"needs {wanted.disk_bytes / 1e6:.1f} MB of disk, this one holds {machine.disk_bytes / 1e6:.1f} MB"
    return ""


def _no_runtime(index: PackageIndex, machine: Machine) -> str:
    """One runtime of the package is enough: the others' variants are measured as what does not run here."""
    wanted = index.compatible.runtimes
    if not wanted:
        return ""
    there = machine.versions(tuple(sorted(wanted)))
    if there is None or any(
        not wanted[name] or _numbers(found) >= _numbers(wanted[name]) for name, found in there.items()
    ):
        return ""
    needs = " or ".join(f"{name} {least}".rstrip() for name, least in sorted(wanted.items()))
    has = ", ".join(f"{name} {found}" for name, found in sorted(there.items())) or "none of them"
    return f"runs in {needs}, this machine has {has}"


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _memory_mib(root: Path) -> int | None:
    found = []
    total = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if total:
        found.append(int(total.group(1)) // 1024)
    group = re.search(r"^0::(/.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    path = root / "sys/fs/cgroup" / (group.group(1).strip("/") if group else "")
    while group and (root / "sys/fs/cgroup") in (path, *path.parents):
        limit = _text(path / "memory.max").strip()
        if limit.isdigit():
            found.append(int(limit) // 2**20)
        path = path.parent
    return min(found, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def installed_runtimes(names: tuple[str, ...]) -> Mapping[str, str] | None:
    """The runtimes among `names` that can be loaded here, with their versions, asked once a process; None: not known.

    Where one of several breaks the child, each is asked alone.
    """
    try:
        return _asked(names)
    except _BROKEN as error:
        _log.warning("the runtimes %s cannot be asked together: %s", ", ".join(names), error)
    found: dict[str, str] = {}
    broken = 0
    for name in names:
        try:
            found.update(_asked((name,)))
        except _BROKEN as error:
            _log.warning("the runtime %s cannot say its version: %s", name, error)
            broken += 1
    return None if broken == len(names) else found


_BROKEN = (OSError, subprocess.SubprocessError, ValueError)


@cache
def _asked(names: tuple[str, ...]) -> Mapping[str, str]:
    command = [sys.executable, "-c", "from edgeopt_agent.fits import tell; tell()", *names]
    done = subprocess.run(command, capture_output=True, timeout=ASK_TIMEOUT_S, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"its process ended with {done.returncode}: {last}")
    return {str(name): str(version) for name, version in json.loads(done.stdout).items()}


def tell(names: Sequence[str] = ()) -> None:
    """Print the versions of the runtimes named on the command line; those that are not here are left out."""
    from edgeopt_agent import runtimes

    found = {}
    for name in names or sys.argv[1:]:
        try:
            found[name] = runtimes.find(name).version()
        except (UnsupportedError, ImportError) as error:
            _log.debug("%s: %s", name, error)
    sys.stdout.write(json.dumps(found))
