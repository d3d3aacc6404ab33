# SPDX-License-Identifier: Apache-2.0
"""Faults at system calls: the agent is killed at, or refused, each call that writes into its state directory.

strace injects. A first run without a fault lists the calls; each is then a case of its own with each fault of `FAULTS`.
After every case the device serves what it may, and ends where it was told to (`scenarios.Site.check`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from scenarios import SCENARIOS, Scenario, Site

CALLS = ("openat", "write", "pwrite64", "fsync", "fdatasync", "fallocate", "ftruncate", "rename", "unlink", "mkdir",
         "rmdir", "unlinkat", "symlink", "sendfile", "copy_file_range")  # fmt: skip
"""The calls that can change a file system, as this agent's Python makes them."""

FAULTS = {
    "killed": "signal=KILL:when={0}",
    "EIO": "error=EIO:when={0}",
    "ENOSPC": "error=ENOSPC:when={0}",
    "EIO from then on": "error=EIO:when={0}+",
    "ENOSPC from then on": "error=ENOSPC:when={0}+",
    "EROFS from then on": "error=EROFS:when={0}+",
}
EVERYWHERE = ("killed", "EIO")
"""What is tried in every scenario; the update gets all."""

WRITING = re.compile(r"O_WRONLY|O_RDWR|O_CREAT")
SAMPLE = 10
KILLED = 137


@dataclass(frozen=True)
class Case:
    """The call numbered `when` of its kind, and what happens to it."""

    call: str
    when: int
    fault: str


def _why_not() -> str:
    if shutil.which("strace") is None:
        return "no strace here: apt-get install strace"
    tried = subprocess.run(
        ["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False
    )
    return f"strace may not trace here: {tried.stderr.strip()}" if tried.returncode else ""


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


def _run(site: Site, state: Path, scenario: Scenario, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        ["strace", "-qq", *options, sys.executable, *site.command(state, scenario)],
        capture_output=True, text=True, timeout=120, check=False, env=environment,
    )  # fmt: skip


def _cases(site: Site, scenario: Scenario, folder: Path) -> list[Case]:
    """Every call of a run without a fault that changes the state directory, times every fault."""
    state, log = site.copy(scenario, folder / "listed"), folder / "log"
    done = _run(site, state, scenario, "-y", "-s", "0", "-o", str(log), "-e", f"trace={','.join(CALLS)}")
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = {}
    found = []
    for line in log.read_text().splitlines():
        call = line.partition("(")[0]
        if call not in CALLS:
            continue
        counts[call] = counts.get(call, 0) + 1
        if str(state) in line and (call != "openat" or WRITING.search(line)):
            found.append((call, counts[call]))
    faults = FAULTS if scenario.name == "update" else EVERYWHERE
    cases = [Case(call, when, fault) for call, when in found for fault in faults]
    # a read-only file system refuses no reading, and `openat` reads as well
    return [case for case in cases if (case.call, case.fault) != ("openat", "EROFS from then on")]


def _check(site: Site, scenario: Scenario, case: Case, state: Path) -> str:
    """What is wrong after a case, or nothing."""
    site.copy(scenario, state)
    inject = f"inject={case.call}:{FAULTS[case.fault].format(case.when)}"
    done = _run(site, state, scenario, "-o", "/dev/null", "-e", f"trace={case.call}", "-e", inject)
    try:
        if case.fault == "killed":
            assert done.returncode in (-9, KILLED), (
                f"it was not killed: {done.returncode} {done.stderr[-300:]}"
            )
        elif done.returncode == 1 and not scenario.before:
            # a device that never ran has nothing to serve: it may say clearly that it cannot make its folders
            assert "edgeopt_wire.errors.StoreError: cannot use the" in done.stderr, done.stderr[-300:]
        else:
            assert done.returncode == 0, f"it ended by {done.returncode}: {done.stderr[-300:]}"
        site.check(state, scenario)
    except Exception as error:
        return f"{scenario.name}, {case}: {error!r:.600}"
    finally:
        shutil.rmtree(state)
    return ""


def _check_all(site: Site, name: str, tmp_path: Path, most: int) -> None:
    scenario = SCENARIOS[name]
    cases = _cases(site, scenario, tmp_path)
    stride = max(1, len(cases) // most) if most else 1
    while stride > 1 and (stride % 2 == 0 or stride % 3 == 0):  # else it would always meet the same faults
        stride += 1
    taken = cases[::stride]
    failed = [
        said for n, case in enumerate(taken) if (said := _check(site, scenario, case, tmp_path / str(n)))
    ]
    print(f"{name}: {len(cases)} cases, {len(taken)} checked, {len(failed)} failed")
    assert len(cases) > len(FAULTS)
    assert not failed, f"{len(failed)} of {len(taken)}:\n" + "\n".join(failed)


@pytest.mark.parametrize("name", ["update", "forget"])
def test_a_fault_at_a_call_that_writes_leaves_a_device_that_serves_and_goes_on(
    site: Site, name: str, tmp_path: Path
) -> None:
    _check_all(site, name, tmp_path, SAMPLE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(SCENARIOS))
def test_every_fault_at_every_call_that_writes(site: Site, name: str, tmp_path: Path) -> None:
    _check_all(site, name, tmp_path, 0)
