# SPDX-License-Identifier: Apache-2.0
"""Faults at system calls: the agent is killed at, or refused, each call that writes into its state directory.

strace injects. A first run without a fault lists the calls; each is then a case of its own with each fault of `FAULTS`.
After every case the device serves what it may, and ends where it was told to (`scenarios.Site.check`).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import device_lives
import pytest
from notes import note
from scenarios import SCENARIOS, Scenario, Site
from zygote import Zygote

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
SAMPLE = 20
LIFE_S = 60.0


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


@pytest.fixture(scope="module")
def zygote(site: Site) -> Iterator[Zygote]:
    scenario = SCENARIOS["update"]
    made = Zygote(site.folder, site.arguments(site.copy(scenario, site.folder / "learned"), scenario))
    yield made
    made.close()


def _run(zygote: Zygote, arguments: list[str], *options: str) -> int:
    """One life under strace; returns its exit status, negative for a signal."""
    life = zygote.begin(arguments)
    strace = subprocess.Popen(
        ["strace", "-p", str(life), *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert strace.stderr is not None
    line = strace.stderr.readline()
    if "attached" not in line:
        zygote.kill()
        raise AssertionError(f"strace could not attach: {line}")
    timer = threading.Timer(LIFE_S, zygote.kill)
    timer.start()
    zygote.let_go()
    status = zygote.end()
    timer.cancel()
    strace.stderr.close()
    strace.wait(10)
    return status


def _calls(log: Path, state: Path) -> list[tuple[str, int, str]]:
    """The calls in a log of strace that change the state directory: name, which of its name, file without chance."""
    counts: dict[str, int] = {}
    found = []
    for line in log.read_text().splitlines():
        call = line.partition("(")[0]
        if call not in CALLS:
            continue
        counts[call] = counts.get(call, 0) + 1
        if str(state) in line and (call != "openat" or WRITING.search(line)):
            path = line[line.index(str(state)) + len(str(state)) :].split('"')[0].split(">")[0]
            found.append((call, counts[call], re.sub(r"(\.half-|/tmp)\w+$", r"\1", path)))
    return found


LISTING = ("-y", "-s", "0", "-e", f"trace={','.join(CALLS)}")


def _cases(zygote: Zygote, site: Site, scenario: Scenario, folder: Path) -> list[Case]:
    """Every call of a run without a fault that changes the state directory, times every fault."""
    state, log = site.copy(scenario, folder / "listed"), folder / "log"
    status = _run(zygote, site.arguments(state, scenario), "-o", str(log), *LISTING)
    assert status == 0, zygote.said()
    faults = FAULTS if scenario.name == "update" else EVERYWHERE
    cases = [Case(call, when, fault) for call, when, _ in _calls(log, state) for fault in faults]
    # a read-only file system refuses no reading, and `openat` reads as well
    return [case for case in cases if (case.call, case.fault) != ("openat", "EROFS from then on")]


def _check(zygote: Zygote, site: Site, scenario: Scenario, case: Case, state: Path) -> str:
    """What is wrong after a case, or nothing."""
    site.copy(scenario, state)
    inject = f"inject={case.call}:{FAULTS[case.fault].format(case.when)}"
    status = _run(
        zygote, site.arguments(state, scenario), "-o", "/dev/null", "-e", f"trace={case.call}", "-e", inject
    )
    said = zygote.said()[-300:]
    try:
        if case.fault == "killed":
            assert status == -signal.SIGKILL, f"it was not killed: {status} {said}"
        elif status == 1 and not scenario.before:
            # a device that never ran has nothing to serve: it may say clearly that it cannot make its folders
            assert "edgeopt_wire.errors.StoreError: cannot use the" in said, said
        else:
            assert status == 0, f"it ended by {status}: {said}"
        site.check(state, scenario)
    except Exception as error:
        return f"{scenario.name}, {case}: {error!r:.600}"
    finally:
        shutil.rmtree(state)
    return ""


def _check_all(zygote: Zygote, site: Site, name: str, tmp_path: Path, most: int) -> None:
    scenario = SCENARIOS[name]
    cases = _cases(zygote, site, scenario, tmp_path)
    stride = max(1, len(cases) // most) if most else 1
    while stride > 1 and (stride % 2 == 0 or stride % 3 == 0):  # else it would always meet the same faults
        stride += 1
    said = {}
    for n, case in enumerate(cases[::stride]):
        said[case] = _check(zygote, site, scenario, case, tmp_path / str(n))
        note("system calls", [(case.fault, f"{scenario.name}: {case.call}", not said[case])])
    failed = [wrong for wrong in said.values() if wrong]
    print(f"{name}: {len(cases)} cases, {len(said)} checked, {len(failed)} failed")
    assert len(cases) > len(FAULTS)
    assert not failed, f"{len(failed)} of {len(said)}:\n" + "\n".join(failed)


def test_a_life_that_begins_by_a_fork_makes_the_calls_of_one_in_a_process_of_its_own(
    zygote: Zygote, site: Site, tmp_path: Path
) -> None:
    scenario = SCENARIOS["update"]
    forked, own = (site.copy(scenario, tmp_path / name) for name in ("forked", "own"))
    assert _run(zygote, site.arguments(forked, scenario), "-o", str(tmp_path / "log-1"), *LISTING) == 0
    done = subprocess.run(
        ["strace", "-qq", "-o", str(tmp_path / "log-2"), *LISTING,
         sys.executable, device_lives.__file__, *site.arguments(own, scenario)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [
        [(call, path) for call, _, path in _calls(tmp_path / log, state)]
        for log, state in (("log-1", forked), ("log-2", own))
    ]
    assert found[0] == found[1]
    assert len(found[0]) > 100


@pytest.mark.parametrize("name", ["update", "forget"])
def test_a_fault_at_a_call_that_writes_leaves_a_device_that_serves_and_goes_on(
    zygote: Zygote, site: Site, name: str, tmp_path: Path
) -> None:
    _check_all(zygote, site, name, tmp_path, SAMPLE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", list(SCENARIOS))
def test_every_fault_at_every_call_that_writes(zygote: Zygote, site: Site, name: str, tmp_path: Path) -> None:
    _check_all(zygote, site, name, tmp_path, 0)
