# SPDX-License-Identifier: Apache-2.0
"""An ExecuTorch file is read by the exporter's own schema: edges, operators, what its delegate computes in integers."""

from pathlib import Path

import pytest

from edgeopt_converters import executorch_file, executorch_graph
from edgeopt_profiles.support import executorch as rules
from edgeopt_wire.errors import RecipeError, StoreError

pytest.importorskip("executorch")

TINY = Path(__file__).parents[1] / "edgeopt_agent/data/tiny.pte"


def test_a_file_is_a_model_whose_edges_are_called_after_their_place() -> None:
    model = executorch_file.load_executorch(TINY, name="tiny")
    assert (model.format, model.name) == ("executorch", "tiny")
    assert [(spec.name, spec.shape, spec.dtype, spec.layout) for spec in (*model.inputs, *model.outputs)] == [
        ("input_0", (1, 3, 8, 8), "float32", "NCHW"),
        ("output_0", (1, 5), "float32", ""),
    ]


def test_operators_count_their_work_and_their_weights() -> None:
    found = {entry.name: entry for entry in executorch_graph.operators(TINY.read_bytes())}
    convolution, linear = found["Conv2d#0"], found["FullyConnected#0"]
    assert convolution.macs == 8 * 8 * 4 * 3 * 3 * 3
    assert linear.macs == 4 * 5
    assert convolution.weight_bytes == 4 * (4 * 27 + 4)
    assert {convolution.dtype, linear.dtype} == {"float32"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no ExecuTorch program: expected b'ET'"),
        (b"TFL3" * 40, "no ExecuTorch program"),
        (TINY.read_bytes()[:64], "is damaged"),
    ],
)
def test_what_is_no_program_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "bad.pte").write_bytes(content)
    with pytest.raises(RecipeError, match=said):
        executorch_file.load_executorch(tmp_path / "bad.pte", name="bad")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none\.pte"):
        executorch_file.load_executorch(tmp_path / "none.pte", name="none")


def test_the_rules_are_those_of_the_installed_partitioner() -> None:
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType

    integers, floats = set(), set()
    for config in ALL_PARTITIONER_CONFIGS:
        made = config()
        has = ConfigPrecisionType.STATIC_QUANT in made.supported_precision_types()
        (integers if has else floats).add(made.target_name.partition(".")[0])
    known = {
        "convolution": "Conv2d", "linear": "FullyConnected", "add": "Add", "sub": "Subtract", "mul": "Multiply",
        "mean": "GlobalAvgPooling2d", "max_pool2d": "MaxPooling2d", "clamp": "Clamp", "elu": "ELU", "cat": "Concatenate2",
        "sigmoid": "Sigmoid", "softmax": "Softmax", "_softmax": "Softmax", "avg_pool2d": "AvgPooling2d", "bmm": "BatchMatrixMultiply",
        "hardswish": "Hardswish", "gelu": "Gelu", "tanh": "Tanh", "div": "Div", "minimum": "Minimum", "maximum": "Maximum",
        "leaky_relu": "LeakyReLU", "exp": "Exp", "abs": "Abs", "neg": "Negate", "upsample_bilinear2d": "StaticResizeBilinear2D",
    }  # fmt: skip
    asked = {known[name] for name in integers if name in known}
    assert asked == rules.INTEGER & set(known.values())
    assert not {known[name] for name in floats if name in known} & rules.INTEGER
    assert {"convolution", "linear", "add", "mean"} <= integers
    assert {"sigmoid", "avg_pool2d", "bmm"} <= floats
