# SPDX-License-Identifier: Apache-2.0
"""Saturating pairs: as the instruction defines them, as ONNX Runtime's AVX2 kernels compute them, and how to be safe."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from onnx import helper

from edgeopt.simulate import pairs
from edgeopt.simulate.integer import IntegerNet
from edgeopt.simulate.layers import Layer, parse, weight_matrix

EMULATOR = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")


def by_definition(row: list[int], column: list[int]) -> int:
    """The sum of products of one row and column, in plain Python, each pair clipped to int16."""
    row, column = [*row, 0], [*column, 0]
    total = 0
    for k in range(0, len(row) - 1, 2):
        pair = row[k] * column[k] + row[k + 1] * column[k + 1]
        total += max(-32768, min(32767, pair))
    return total


@pytest.mark.parametrize("depth", [1, 2, 7, 12])
def test_excess_is_what_clipping_each_pair_takes_away(depth: int) -> None:
    rng = np.random.default_rng(depth)
    rows = rng.integers(0, 256, (2, 9, depth)).astype(np.uint8)
    matrix = rng.choice([-128, -127, -100, -1, 0, 64, 120, 127], (2, depth, 5)).astype(np.int8)
    found = pairs.excess(rows, matrix)
    exact = np.matmul(rows.astype(np.int64), matrix.astype(np.int64))
    for group, m, n in np.ndindex(exact.shape):
        saturated = by_definition(rows[group, m].tolist(), matrix[group, :, n].tolist())
        assert exact[group, m, n] - found.sums[group, m, n] == saturated


def test_clipped_pairs_are_counted() -> None:
    rows = np.array([[[255, 255, 255, 255], [1, 1, 255, 255]]], np.uint8)
    matrix = np.array([[[127], [127], [-127], [-127]]], np.int8)
    assert pairs.excess(rows, matrix).clipped == 3


def _adjusted(layer: Layer, rows: np.ndarray, sums: np.ndarray, _scale: np.ndarray) -> np.ndarray:
    return np.asarray(sums - pairs.excess(rows, layer.matrix).sums)


def test_simulation_equals_the_real_avx2_kernels_bit_by_bit(recorder: ModuleType) -> None:
    recorded = np.load(recorder.RECORDED)
    changed = 0
    for name, (program, inputs) in recorder.cases().items():
        net = IntegerNet(program)
        output = program.graph.output[0].name
        saturated = net.run(inputs, adjust=_adjusted).outputs[output]
        assert np.array_equal(saturated, recorded[name]), name
        changed += not np.array_equal(net.run(inputs).outputs[output], recorded[name])
    assert changed == len(recorded.files) - 4, "all but the four depthwise layers saturate"


@pytest.mark.flow
@pytest.mark.skipif(EMULATOR is None, reason="needs qemu-x86_64-static (Debian: qemu-user-static)")
def test_the_recording_can_be_repeated(recorder: ModuleType, tmp_path: Path) -> None:
    again = tmp_path / "again.npz"
    command = [str(EMULATOR), "-cpu", "Haswell-noTSX", sys.executable, recorder.__file__, str(again)]
    subprocess.run(
        command, check=True, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    recorded, repeated = np.load(recorder.RECORDED), np.load(again)
    assert recorded.files == repeated.files
    assert all(np.array_equal(recorded[name], repeated[name]) for name in recorded.files)


def test_weights_decide_whether_any_input_can_saturate() -> None:
    safe = np.array([[[64], [64], [-128], [127]]], np.int8)  # opposite signs help each other
    unsafe = np.array([[[64], [65], [0], [0]]], np.int8)
    brightest = np.full((1, 1, 4), 255, np.uint8)
    assert not pairs.can_saturate(safe)
    assert pairs.excess(brightest, safe).clipped == 0
    assert pairs.can_saturate(unsafe)
    assert pairs.worst_sum(unsafe) == 255 * 129
    assert pairs.excess(brightest, unsafe).clipped == 1


@pytest.mark.parametrize("seed", range(20))
def test_weights_rounded_in_safe_ranges_never_saturate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(2, (2, rng.integers(1, 40), 30))
    weights[:, :, :10] = abs(weights[:, :, :10])
    weights[:, :, 10] = 1.0  # every pair of it is the worst
    ranges = pairs.safe_ranges(weights)
    integers = np.rint(weights / (ranges[:, None] / 127)).astype(np.int8)
    assert not pairs.can_saturate(integers)
    assert np.all(ranges <= 2 * abs(weights).max(axis=1) * (1 + 1e-12)), "never worse than seven bits"


def test_a_channel_without_a_dangerous_pair_keeps_its_range() -> None:
    weights = np.array([[[1.0, 1.0], [-0.9, 0.9], [0.4, 0.1], [0.4, 0.0]]])
    assert pairs.safe_ranges(weights).tolist() == [[1.0, 1.9]]


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 5, 1, 3), (4, 6, 1, 1), (2, 1, 3, 3)])
def test_partners_are_the_weights_that_are_multiplied_together(shape: tuple[int, ...]) -> None:
    weights = np.arange(1, 1 + np.prod(shape)).reshape(shape)
    node: Any = parse(helper.make_node("Conv", ["x", "w"], ["y"]))
    matrix = weight_matrix(node, weights)
    assert matrix is not None
    paired = {
        tuple(sorted(pair)) for pair in pairs.as_pairs(matrix)[0].transpose(0, 2, 1).reshape(-1, 2).tolist()
    }
    flat = weights.reshape(shape[0], -1)
    found = set()
    for row in flat:
        for index, other in enumerate(pairs.partners(shape[1], int(np.prod(shape[2:])))):
            found.add(tuple(sorted((int(row[index]), int(row[other]) if other >= 0 else 0))))
    assert found == paired
