# SPDX-License-Identifier: Apache-2.0
"""The protocol's best known client, from PyPI and unchanged, against the agent's loopback port.

It is in no extra (it brings gevent and aiohttp): `pip install 'tritonclient[http]'` into any environment, and name its
Python in EDGEOPT_TRITON_PYTHON.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Rig = Any
SCRIPT = Path(__file__).with_name("triton_asks.py")
PYTHON = os.environ.get("EDGEOPT_TRITON_PYTHON") or (
    sys.executable if importlib.util.find_spec("tritonclient") else ""
)
pytestmark = [
    pytest.mark.flow,
    pytest.mark.skipif(
        not PYTHON, reason="no tritonclient[http]; name a Python that has it in EDGEOPT_TRITON_PYTHON"
    ),
]
SCORES = [1.0, 9.0, 5.0, 3.0]


def test_tritonclient_infers_with_json_binary_and_shared_memory(rig: Rig) -> None:
    rig.install(changes={"labels": "labels.txt"}, files={"labels.txt": "a\nb\nc\nd\n"})
    done = subprocess.run([PYTHON, SCRIPT, rig.url], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [found[key] for key in ("live", "ready", "model_ready", "version_ready", "other_ready")] == [
        True
    ] * 4 + [False]
    assert found["server"]["name"] == "edgeopt-agent"
    assert found["model"]["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [1, 2, 4, 4]}]
    assert found["config"]["output"] == [{"name": "scores", "data_type": "TYPE_FP32", "dims": [1, 4]}]
    assert found["index"] == [{"name": "tiny", "version": "1", "state": "READY", "reason": ""}]
    assert found["unload"][0] == "403"
    assert found["answers"] == [SCORES] * 4
    assert found["compressed"] == [SCORES] * 2
    assert found["with_all"] == found["no_outputs_named"] == SCORES
    assert found["classes"] == ["9.000000:1:b", "5.000000:2:c"]
    assert found["async"] == [SCORES] * 8
    assert {key: error[0] for key, error in found["errors"].items()} == {
        "model": "404", "version": "404", "sequence": "400", "output": "404",
    }  # fmt: skip
    shared = found["shared"]
    assert [entry["byte_size"] for entry in shared["status"]] == [128, 16]
    assert shared["answer"] == SCORES
    codes = [shared[key][0] for key in ("beyond", "twice", "too_long", "absent", "gone")]
    assert codes == ["400", "400", "400", "400", "404"]
    assert shared["after"] == []
    assert found["statistics"]["model_stats"][0]["inference_count"] >= 18
