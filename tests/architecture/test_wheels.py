# SPDX-License-Identifier: Apache-2.0
"""What a user gets: both wheels, built and installed into clean environments, with nothing of this tree in reach."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgeopt_wire.archive import write_archive
from edgeopt_wire.document import to_bytes
from edgeopt_wire.manifest import MANIFEST_PATH, Compatible, FileEntry, Manifest, Provenance, Variant
from edgeopt_wire.tensor import TensorSpec

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "edgeopt": {"edgeopt": "sdk", "edgeopt_converters": "converters", "edgeopt_profiles": "device_profiles"},
    "edgeopt_agent": {"edgeopt_agent": "agent", "edgeopt_wire": "agent"},
}

pytestmark = [pytest.mark.flow, pytest.mark.timeout(300)]


def run(*command: object, cwd: Path, expect: int = 0) -> str:
    """Run outside of the source tree, without what the caller's environment says about Python."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "EDGEOPT"))
    }
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == expect, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    for source in (ROOT, ROOT / "agent"):
        run(
            sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder
        )
    return {wheel.name.split("-")[0]: wheel for wheel in folder.glob("*.whl")}


def install(folder: Path, *names: object) -> Path:
    """Install into a clean environment below `folder`; return its folder of commands."""
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    commands = folder / "venv" / "bin"
    pip = [commands / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--constraint", ROOT / "constraints.txt", *names, cwd=folder)
    return commands


@pytest.fixture(scope="module")
def edgeopt(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("sdk"), wheels["edgeopt_agent"], wheels["edgeopt"]) / "edgeopt"


def tiny_package(path: Path) -> Path:
    tensor = TensorSpec("x", (1, 2), "float32")
    variant = Variant("v", "null", "fp32", "variants/v.json", (tensor,), (tensor,), "golden/outputs/v", 40.0)
    entry = FileEntry("variants/v.json", 2, hashlib.sha256(b"{}").hexdigest())
    manifest = Manifest(
        "tiny", "1", "host", Compatible(("host",)), (tensor,), (tensor,), (variant,), (entry,), "golden/inputs", {},
        Provenance("0" * 64, "0" * 64),
    )  # fmt: skip
    with path.open("wb") as file:
        write_archive(file, {MANIFEST_PATH: to_bytes(manifest), "variants/v.json": b"{}"})
    return path


@pytest.mark.parametrize("wheel", sorted(PACKAGES))
def test_a_wheel_holds_every_file_of_its_packages_and_nothing_else(
    wheels: dict[str, Path], wheel: str
) -> None:
    with zipfile.ZipFile(wheels[wheel]) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
    listed = set()
    for package, top in PACKAGES[wheel].items():
        tracked = run(
            "git", "ls-files", "--cached", "--others", "--exclude-standard", f"{top}/{package}", cwd=ROOT
        )
        listed |= {line.removeprefix(f"{top}/") for line in tracked.splitlines() if (ROOT / line).is_file()}
    assert found == listed
    needed = {
        "edgeopt": [
            "edgeopt/fleet/page.html",
            "edgeopt/report/page.css",
            "edgeopt_profiles/data/x86-64.toml",
        ],
        "edgeopt_agent": ["edgeopt_agent/py.typed", "edgeopt_wire/py.typed"],
    }
    assert set(needed[wheel]) <= found


def test_the_agent_alone_is_enough_for_a_device(wheels: dict[str, Path], tmp_path: Path) -> None:
    commands = install(tmp_path, wheels["edgeopt_agent"])
    assert "run" in run(commands / "edgeopt-agent", "--help", cwd=tmp_path)
    names = {
        item["name"]
        for item in json.loads(
            run(commands / "python", "-m", "pip", "list", "--format", "json", cwd=tmp_path)
        )
    }
    assert "edgeopt-agent" in names
    assert not names & {"edgeopt", "numpy", "click", "onnx", "torch"}


def test_both_wheels_give_a_working_command_line(
    edgeopt: Path, wheels: dict[str, Path], tmp_path: Path
) -> None:
    assert "build" in run(edgeopt, "--help", cwd=tmp_path)
    version = wheels["edgeopt"].name.split("-")[1]
    assert version in run(edgeopt, "--version", cwd=tmp_path)
    devices = run(edgeopt, "devices", cwd=tmp_path)
    assert "raspberry-pi-5" in devices
    assert "jetson-orin" in devices
    package = tiny_package(tmp_path / "tiny-1-host.edgeopt")
    assert "tiny" in run(edgeopt, "inspect", package, cwd=tmp_path)
    assert json.loads(run(edgeopt, "inspect", "--json", package, cwd=tmp_path))["schema"].startswith(
        "edgeopt."
    )


def test_what_an_extra_would_bring_is_named_when_it_is_missing(edgeopt: Path, tmp_path: Path) -> None:
    """A build without frameworks ends in a sentence with the extra to install, not in a traceback."""
    (tmp_path / "model.onnx").write_bytes(b"not read")
    said = run(edgeopt, "build", "model.onnx", "--device", "host", cwd=tmp_path, expect=1)
    assert "edgeopt[" in said, said
    assert "Traceback" not in said
