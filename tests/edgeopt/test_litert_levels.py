# SPDX-License-Identifier: Apache-2.0
"""A LiteRT file has the number format that each operator was given, and a search over them survives being killed."""

import tempfile
from functools import cache
from pathlib import Path

import killed_search
import numpy as np
import pytest

from edgeopt import litert_levels as subject
from edgeopt import search
from edgeopt.ranges import Range
from edgeopt.side_by_side import loaded
from edgeopt_wire.tensor import TensorSpec

pytest.importorskip("ai_edge_quantizer")
pytest.importorskip("litert_torch")

SAMPLES = np.random.default_rng(0).normal(size=(4, 1, 3, 16, 16)).astype(np.float32)


@cache
def _program() -> bytes:
    """A small net: dense, depthwise and 1x1 convolution, pooling, a classifier."""
    import litert_torch
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU6(), torch.nn.Conv2d(16, 16, 3, padding=1, groups=16),
        torch.nn.ReLU6(), torch.nn.Conv2d(16, 32, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(32, 10),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.tflite"
        litert_torch.convert(net.eval(), (torch.zeros(1, 3, 16, 16),)).export(str(path))
        return path.read_bytes()


EDGES = ((TensorSpec("args_0", (1, 3, 16, 16), "float32"),), (TensorSpec("output_0", (1, 10), "float32"),))


def _outputs(file: bytes) -> np.ndarray:
    with loaded(file, "litert", *EDGES) as session:
        rows = [session.run({"args_0": sample})["output_0"] for sample in SAMPLES]
    return np.stack(rows).astype(np.float64)


def _ranges() -> dict[str, Range]:
    from ai_edge_litert import schema_py_generated as schema

    graph = schema.ModelT.InitFromObj(schema.Model.GetRootAs(_program(), 0)).subgraphs[0]
    return {tensor.name.decode(): Range(-6.0, 6.0) for tensor in graph.tensors if tensor.type == 0}


def _sqnr_db(file: bytes) -> float:
    exact = _outputs(_program())
    return float(10 * np.log10(np.square(exact).sum() / np.square(_outputs(file) - exact).sum()))


def _products() -> list[subject.Operator]:
    return [entry for entry in subject.operators(_program()) if entry.type in subject.PRODUCTS]


def test_operators_are_named_by_what_survives_an_export() -> None:
    assert [entry.described for entry in _products()] == [
        "Conv#0",
        "Conv#1",
        "Conv#2",
        "Gemm#0",
    ]


@pytest.mark.parametrize(
    ("selector", "numbers"),
    [
        ("Conv#1", [1]),
        ("DEPTHWISE_CONV_2D", [1]),
        ("role:pointwise", [2]),
        ("role:classifier", [3]),
        ("role:first", [0]),
    ],
)
def test_a_recipe_means_the_same_operators_as_in_onnx(selector: str, numbers: list[int]) -> None:
    chosen = subject.choose(_program(), [selector])
    assert [number for number, entry in enumerate(_products()) if entry.name in chosen] == numbers


def test_ranges_read_off_an_int8_file_make_the_same_integers_again() -> None:
    once = subject.quantize(_program(), _ranges(), {})
    again = subject.quantize(_program(), subject.read_ranges(once), {})
    assert np.abs(_outputs(once) - _outputs(again)).max() < 0.05


def test_half_floats_take_half_the_bytes_of_floats_and_are_as_good() -> None:
    everything = [entry.name for entry in subject.operators(_program())]
    halves = subject.quantize(_program(), _ranges(), dict.fromkeys(everything, "fp16"))
    assert _sqnr_db(halves) > 40
    integers = subject.quantize(_program(), _ranges(), {})
    assert _sqnr_db(integers) < 35


@pytest.mark.parametrize("level", ["fp32", "fp16"])
def test_only_the_operator_that_is_named_leaves_int8(level: str) -> None:
    from edgeopt_converters.litert_graph import operators

    first = _products()[0]
    made = operators(subject.quantize(_program(), _ranges(), {first.name: level}))
    floats = [entry.type for entry in made if entry.macs and "float" in entry.dtype]
    assert floats == ["CONV_2D"]
    assert [entry.type for entry in made if entry.macs and entry.dtype == "int8"] == [
        "DEPTHWISE_CONV_2D",
        "CONV_2D",
        "FULLY_CONNECTED",
    ]


def test_sixteen_bits_for_activations_run() -> None:
    chosen = {entry.name: "int16" for entry in subject.operators(_program())}
    assert _sqnr_db(subject.quantize(_program(), _ranges(), chosen)) > _sqnr_db(
        subject.quantize(_program(), _ranges(), {})
    )


def test_four_bits_are_smaller_and_worse() -> None:
    chosen = {entry.name: "int4" for entry in _products() if entry.type in subject.FOUR_BITS}
    small, plain = (subject.quantize(_program(), _ranges(), levels) for levels in (chosen, {}))
    assert len(small) < len(plain)
    assert _sqnr_db(small) < _sqnr_db(plain)


def trial() -> search.Trial:
    """A search on real files in the real runtime; times are counted, so that the walk is the same each time."""
    names = [entry.name for entry in _products()]

    def make(changes: search.Changes) -> bytes:
        return subject.quantize(_program(), _ranges(), {entry.operator: entry.level for entry in changes})

    def judge(file: bytes) -> search.Judged:
        return search.Judged(0.0, _sqnr_db(file))

    def time(file: bytes) -> tuple[float, bool]:
        return len(file) / 100_000, True

    knobs = tuple(search.Knob(name, ("fp32", "fp16")) for name in names)
    return search.Trial(knobs, search.Goal("sqnr_db", 45.0), make, judge, time)


@pytest.mark.parametrize("kill_after", [1, 4])
def test_killed_at_any_time_leaves_a_loadable_file_and_resumes(tmp_path: Path, kill_after: int) -> None:
    net = tmp_path / "net.tflite"
    net.write_bytes(_program())
    before = f"t._program = lambda: Path({str(net)!r}).read_bytes()"
    killed_search.run(Path(__file__), tmp_path, kill_after, "t.trial()", before)
    assert _outputs((tmp_path / search.BEST).read_bytes()).shape[-1] == 10
    found = search.search(trial(), tmp_path, "key")
    assert found.finished
    assert _outputs((tmp_path / search.BEST).read_bytes()).shape[-1] == 10
