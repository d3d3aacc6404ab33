# SPDX-License-Identifier: Apache-2.0
"""The C header: compiled without a warning, and asking the real agent."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Rig = Any
SOURCE = Path(__file__).parents[3] / "agent/examples/c/infer.c"
COMPILER = shutil.which("gcc") or shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
IMAGE = np.repeat(np.float32([1, 9, 5, 3]), 8).reshape(1, 2, 4, 4)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    assert COMPILER is not None
    out = tmp_path / "infer"
    warnings = ["-std=c99", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1"]
    subprocess.run([COMPILER, *warnings, "-o", out, SOURCE], check=True, timeout=60)
    return out


def ask(rig: Rig, program: Path, *words: str, content: bytes = IMAGE.tobytes()) -> tuple[int, list[str], str]:
    done = subprocess.run(
        [program, rig.path, *words], input=content, capture_output=True, timeout=30, check=False
    )
    return done.returncode, done.stdout.decode().split(), done.stderr.decode()


def test_a_c_program_infers_and_is_told_why_when_it_cannot(rig: Rig, program: Path) -> None:
    rig.install()
    assert ask(rig, program, "tiny", "image", "FP32", "1,2,4,4", "scores") == (0, ["1", "9", "5", "3"], "")
    for words, says in (
        (("none", "image", "FP32", "1,2,4,4", "scores"), "unknown model"),
        (("tiny", "image", "FP32", "1,2,4,5", "scores"), "shape"),
        (("tiny", "image", "INT8", "1,2,4,4", "scores"), "datatype"),
        (("tiny", "image", "FP32", "1,2,4,4", "other"), "unknown output"),
    ):
        code, _, error = ask(rig, program, *words)
        assert (code, says in error) == (3, True), error
    rig.install(failure="raise", fail_after=1, version="2", slot="B")
    assert ask(rig, program, "tiny", "image", "FP32", "1,2,4,4", "scores")[0] == 4
    rig.server.stop()
    assert ask(rig, program, "tiny", "image", "FP32", "1,2,4,4", "scores")[0] == 1
