# SPDX-License-Identifier: Apache-2.0
"""The drill of docs/trust.md, run as it is written there: real processes, real keys, a real broker."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from publishing import write_package

from edgeopt.fleet.broker import free_port
from edgeopt.package import write_package as pack
from edgeopt_wire.document import from_bytes
from edgeopt_wire.manifest import Manifest

pytestmark = [pytest.mark.flow, pytest.mark.slow]
DOCUMENT = Path(__file__).parents[2] / "docs" / "trust.md"


def package(folder: Path, version: str) -> Path:
    stage = folder / f"stage-{version}"
    write_package(stage, {"a": {}}, name="model", version=version)
    manifest = from_bytes(Manifest, (stage / "manifest.json").read_bytes())
    target = folder / f"model-{version}-host.edgeopt"
    pack(stage, manifest, target)
    return target


def test_drill_runs_as_written_and_the_device_follows_the_new_keys(tmp_path: Path) -> None:
    blocks = re.findall(r"^```sh drill\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    script = "set -eu\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n" + "\n".join(blocks)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PACKAGE": str(package(tmp_path, "1")),
        "NEXT": str(package(tmp_path, "2")),
        "FIRST": "1",
        "SECOND": "2",
        "MQTT": str(free_port()),
        "HTTP": str(free_port()),
    }
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    status = subprocess.run(
        [Path(sys.executable).parent / "edgeopt-agent", "status", "--config", "drill/device/agent.json"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "model 2" in status.stdout
    roots = sorted(path.name for path in (tmp_path / "drill/device/state/metadata/root_history").iterdir())
    assert roots == ["1.root.json", "2.root.json"]
