# SPDX-License-Identifier: Apache-2.0
"""Which weights OpenVINO's kernels for x86 without VNNI add in pairs: the library itself is asked, with its newer
instructions switched off."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeopt.simulate.pairs import every_partner

pytest.importorskip("openvino")
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="pairs saturate on x86")

ASK = Path(__file__).with_name("ask_openvino.py")


def overflowing(isa: str, channels: int, kernel: int) -> set[tuple[int, int]]:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ASK), str(channels), str(kernel)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    return {(first, second) for first, second in json.loads(done.stdout)}


def paired(partner: np.ndarray) -> set[tuple[int, int]]:
    return {(index, int(other)) for index, other in enumerate(partner) if other > index}


@pytest.mark.parametrize(("channels", "kernel"), [(3, 3), (4, 3), (5, 1), (8, 1)])
def test_openvino_pairs_channels_of_one_position(channels: int, kernel: int) -> None:
    ways = every_partner(channels, kernel * kernel)
    assert overflowing("AVX2", channels, kernel) == paired(ways[-1])


def test_a_first_layer_of_three_channels_is_paired_otherwise_than_in_onnxruntime() -> None:
    onnxruntime, openvino = every_partner(3, 9)
    assert paired(onnxruntime) != paired(openvino)


def test_one_channel_is_never_added_to_another_position() -> None:
    assert overflowing("AVX2", 1, 3) == set()
