# SPDX-License-Identifier: Apache-2.0
"""Power cuts: whatever of the unflushed is lost, behind whichever operation, the device serves and goes on.

One run on a recording file system (FUSE) gives every operation in order; every image that a cut behind any of them can
leave (`disk.py`) is laid out, an agent starts on it, serves, and ends where it was told to. `make test` takes a sample,
`make test-all` every image.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import device_lives
import pytest
from disk import Operation, cuts, write_image
from notes import note
from scenarios import NAMES, SCENARIOS, Site

SAMPLE = 12
"""Images of a scenario that `make test` takes, evenly spread."""


def _why_not() -> str:
    if not Path("/dev/fuse").exists() or shutil.which("fusermount3") is None:
        return "no FUSE here: apt-get install fuse3"
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:
        return f"no mfusepy here: {error}"
    return ""


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def recorded(site: Site) -> dict[str, list[Operation]]:
    """The operations of each scenario, recorded once."""
    return {}


def _record(site: Site, name: str) -> list[Operation]:
    folder = site.folder / f"recorded-{name}"
    scenario = SCENARIOS[name]
    below = site.copy(scenario, folder / "below")
    mountpoint, notes = folder / "mounted", folder / "notes"
    mountpoint.mkdir()
    script = str(Path(__file__).with_name("recorder.py"))
    mounted = subprocess.Popen([sys.executable, script, str(below), str(mountpoint), str(notes)])
    try:
        while not os.path.ismount(mountpoint):
            assert mounted.poll() is None, "the recording file system did not come up"
            time.sleep(0.02)
        done = subprocess.run(
            [sys.executable, device_lives.__file__, *site.arguments(mountpoint, scenario)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["fusermount3", "-u", str(mountpoint)], check=False)
        mounted.wait(10)
    return list(_read(notes))


def _read(notes: Path) -> Iterator[Operation]:
    with notes.open("rb") as file:
        while file.peek(1):
            yield pickle.load(file)


def _check_all(site: Site, recorded: dict[str, list[Operation]], name: str, tmp_path: Path, most: int) -> int:
    scenario = SCENARIOS[name]
    if name not in recorded:
        recorded[name] = _record(site, name)
    images = list(cuts(site.before(scenario), recorded[name]))
    stride = max(1, len(images) // most) if most else 1
    failed = []
    for number, (cut, left, image) in list(enumerate(images))[::stride]:
        state = tmp_path / str(number)
        write_image(image, state)
        is_well = False
        try:
            site.check(state, scenario)
            is_well = True
        except Exception as error:
            before = recorded[name][cut - 1] if cut else "nothing"
            failed.append(
                f"{name}, cut behind operation {cut} {str(before)[:90]}, {left} left: {error!r:.300}"
            )
        note("power cuts", [(left, left, is_well)])
        shutil.rmtree(state)
    print(f"{name}: {len(recorded[name])} operations, {len(images)} images, {len(images[::stride])} checked")
    assert not failed, f"{len(failed)} of {len(images)}:\n" + "\n".join(failed)
    return len(images)


@pytest.mark.parametrize("name", NAMES)
def test_a_power_cut_anywhere_leaves_a_device_that_serves_and_goes_on(
    site: Site, recorded: dict[str, list[Operation]], name: str, tmp_path: Path
) -> None:
    assert _check_all(site, recorded, name, tmp_path, SAMPLE) >= SAMPLE


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_a_power_cut_with_every_image_that_it_can_leave(
    site: Site, recorded: dict[str, list[Operation]], name: str, tmp_path: Path
) -> None:
    _check_all(site, recorded, name, tmp_path, 0)
