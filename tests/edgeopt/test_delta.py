# SPDX-License-Identifier: Apache-2.0
"""A delta between two packages follows tensors by name, wherever they moved, and is small where few integers changed."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from publishing import write_package

from edgeopt.delta import make_delta
from edgeopt.delta.blocks import match
from edgeopt.delta.spans import spans_of
from edgeopt_wire.archive import write_archive
from edgeopt_wire.delta import apply_delta
from edgeopt_wire.index import PackageIndex, index_of
from edgeopt_wire.manifest import Compatible

RNG = np.random.default_rng(0)
WEIGHTS = {f"w{number}": RNG.integers(-127, 128, (64, 512)).astype(np.int8) for number in range(6)}

Package = tuple[Path, PackageIndex]


def _model(weights: dict[str, np.ndarray], note: str = "") -> bytes:
    nodes = [helper.make_node("Cast", [name], [f"f{name}"], to=TensorProto.FLOAT) for name in weights]
    outputs = [helper.make_tensor_value_info(f"f{name}", TensorProto.FLOAT, None) for name in weights]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [], outputs, tensors, doc_string=note)
    found: bytes = helper.make_model(graph).SerializeToString()
    return found


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., Package]:
    def make(version: str, model: bytes, name: str = "model.onnx") -> Package:
        folder = tmp_path / f"content-{version}"
        folder.mkdir()
        (folder / name).write_bytes(model)
        write_package(folder, {"a": {}}, version=version)
        path = tmp_path / f"{version}.edgeopt"
        with path.open("w+b") as file:
            write_archive(
                file, {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
            )
        about = {"name": "tiny", "version": version, "device": "host", "compatible": Compatible(("host",))}
        return path, index_of(path, **about)  # type: ignore[arg-type]

    return make


def _size(base: Package, target: Package, tmp_path: Path) -> float:
    """The share of the target that the delta has, after it was applied and made the target."""
    file = tmp_path / "delta"
    make_delta(base, target, file)
    made = io.BytesIO()
    with file.open("rb") as delta, base[0].open("rb") as old:
        apply_delta(delta, old, made, (target[1].sha256, target[1].size_bytes))
    assert made.getvalue() == target[0].read_bytes()
    return file.stat().st_size / target[1].size_bytes


def _tuned(share: float) -> dict[str, np.ndarray]:
    """Weights as fine-tuning leaves them: a share moved by a step, some by two."""
    found = {}
    for name, array in WEIGHTS.items():
        moved = RNG.choice([-1, 1], array.shape) * (1 + (RNG.random(array.shape) < 0.15))
        hit = RNG.random(array.shape) < share
        found[name] = np.where(hit, np.clip(array + moved, -127, 127), array).astype(np.int8)
    return found


def test_a_quarter_of_the_integers_changed_travels_as_less_than_a_fifth(
    package: Callable[..., Package], tmp_path: Path
) -> None:
    base, target = package("1", _model(WEIGHTS)), package("2", _model(_tuned(0.25)))
    assert _size(base, target, tmp_path) < 0.65 * 0.25


def test_tensors_are_found_by_name_behind_a_longer_header_and_in_another_order(
    package: Callable[..., Package], tmp_path: Path
) -> None:
    tuned = _tuned(0.1)
    moved = dict(reversed(tuned.items()))
    base, target = package("1", _model(WEIGHTS)), package("2", _model(moved, "a note " * 100))
    straight = package("3", _model(tuned))
    assert _size(base, target, tmp_path) < 1.1 * _size(base, straight, tmp_path) + 0.01


def test_a_package_with_another_model_is_not_worth_a_delta_and_still_right(
    package: Callable[..., Package], tmp_path: Path
) -> None:
    other = {name: RNG.permuted(array) for name, array in WEIGHTS.items()}
    base, target = package("1", _model(WEIGHTS)), package("2", _model(other))
    assert not make_delta(base, target, tmp_path / "delta")
    assert _size(base, target, tmp_path) < 1.02


def test_files_that_nobody_can_read_are_compared_byte_by_byte_or_by_blocks(
    package: Callable[..., Package], tmp_path: Path
) -> None:
    content = RNG.bytes(50_000)
    base = package("1", content, "engine.bin")
    longer = package("2", content[:20_000] + b"inserted" + content[20_000:], "engine.bin")
    assert _size(base, longer, tmp_path) < 0.1
    broken = package("3", b"\x0a" + content, "model.onnx")
    assert _size(base, broken, tmp_path) <= 1.02


def test_spans_are_where_the_tensors_are(tmp_path: Path) -> None:
    content = _model(WEIGHTS)
    spans = spans_of("a/model.onnx", content)
    assert spans.keys() == WEIGHTS.keys()
    for name, (start, length) in spans.items():
        assert content[start : start + length] == WEIGHTS[name].tobytes()
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(WEIGHTS["w0"], ""))
    graph = helper.make_graph(
        [constant], "g", [], [helper.make_tensor_value_info("k", TensorProto.INT8, None)]
    )
    content = helper.make_model(graph).SerializeToString()
    start, length = spans_of("m.onnx", content)["k:0"]
    assert content[start : start + length] == WEIGHTS["w0"].tobytes()
    assert onnx.load_from_string(content).graph.node[0].op_type == "Constant"


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"\x3a\xff\xff\xff\xff\x0f", b"\x3b" * 9])
def test_what_is_no_model_has_no_spans(content: bytes) -> None:
    assert spans_of("m.onnx", content) == spans_of("m.tflite", content) == spans_of("m.bin", content) == {}


def test_blocks_meet_without_overlap_and_say_the_same() -> None:
    old = RNG.bytes(5_000)
    new = RNG.bytes(77) + old[1_003:3_007] + RNG.bytes(13) + old[200:900]
    found = list(match(old, new))
    assert sum(length for _, _, length in found) > 2_600
    done = 0
    for at, place, length in found:
        assert at >= done
        assert new[at : at + length] == old[place : place + length]
        done = at + length
