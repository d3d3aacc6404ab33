# SPDX-License-Identifier: Apache-2.0
"""Static placement says which operators run where they should, and the reason for each that does not."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from edgeopt_profiles import support
from edgeopt_profiles.operators import Operator, Tensor
from edgeopt_profiles.support import edgetpu, litert, onnxruntime, tensorrt
from edgeopt_wire.errors import RecipeError


def operator(kind: str, name: str = "", **given: object) -> Operator:
    """One operator; int8 with a shape that every runtime takes, unless told otherwise."""
    dtype = str(given.get("dtype", "int8"))
    shape = given.get("shape", (1, 8, 8, 4))
    made = given.get("made", shape)
    source = Tensor("x", shape, str(given.get("reads", dtype)))  # type: ignore[arg-type]
    return Operator(
        name or kind, kind, (source,), (Tensor("y", made, str(given.get("writes", dtype))),), 0, 0, dtype
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("name", support.names())
def test_rules_sort_every_operator_once_and_keep_the_order(name: str) -> None:
    model = [
        operator("CONV_2D", "a"),
        operator("Conv", "b"),
        operator("Odd", "c", dtype="float32"),
        operator("ADD", "d"),
    ]

    placement = support.find(name).place(model)

    left = [entry.name for entry in placement.left_out]
    assert sorted([*placement.on_accelerator, *left]) == ["a", "b", "c", "d"]
    assert list(placement.on_accelerator) == sorted(placement.on_accelerator)
    assert left == sorted(left)
    assert all(entry.reason for entry in placement.left_out)


@pytest.mark.parametrize("name", support.names())
def test_empty_model_has_an_empty_placement(name: str) -> None:
    assert support.find(name).place([]) == support.Placement((), ())


def test_rules_are_there_for_every_runtime_and_accelerator_of_a_profile() -> None:
    from edgeopt_profiles.profile import load_profile, profile_ids

    targets = [target for name in profile_ids() for target in load_profile(name).targets]
    needed = {target.runtime if target.accelerator == "cpu" else target.accelerator for target in targets}

    assert needed <= set(support.names())


def test_unknown_rules_are_named() -> None:
    with pytest.raises(RecipeError, match="did you mean 'edgetpu'"):
        support.find("edgetpus")


def test_edge_tpu_stops_at_the_first_operator_that_it_lacks() -> None:
    placement = edgetpu.place(
        [operator("CONV_2D", "a"), operator("TRANSPOSE", "b"), operator("CONV_2D", "c")]
    )

    assert placement.on_accelerator == ("a",)
    assert placement.left_out[0] == ("b", "TRANSPOSE", "the Edge TPU has no such operator")
    assert "ends at a TRANSPOSE" in placement.left_out[1].reason


def test_edge_tpu_leaves_float_edges_to_the_cpu_and_maps_what_is_between() -> None:
    model = [
        operator("QUANTIZE", "in", reads="float32"),
        operator("CONV_2D", "conv"),
        operator("DEQUANTIZE", "out", writes="float32"),
    ]

    placement = edgetpu.place(model)

    assert placement.on_accelerator == ("conv",)
    assert [entry.name for entry in placement.left_out] == ["in", "out"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"kind": "CONV_2D", "dtype": "float32"}, "only 8-bit integers"),
        ({"kind": "CONV_2D", "shape": (-1, 8, 8, 4)}, "every size must be fixed"),
        ({"kind": "CONV_2D", "shape": (2, 8, 8, 4)}, "three last axes"),
        ({"kind": "SOFTMAX", "shape": (1, 16_001)}, "at most 16000"),
        ({"kind": "SOFTMAX", "shape": (8, 8)}, "one axis"),
        ({"kind": "FULLY_CONNECTED", "shape": (8, 8)}, "must have one axis"),
        ({"kind": "MEAN", "shape": (4, 8), "made": (1, 8)}, "batch axis"),
    ],
)
def test_edge_tpu_says_what_it_cannot_take(given: dict[str, object], reason: str) -> None:
    (left,) = edgetpu.place([operator(str(given.pop("kind")), **given)]).left_out

    assert reason in left.reason


def test_edge_tpu_takes_the_weights_of_a_convolution_whatever_their_shape() -> None:
    tensors = (
        Tensor("x", (1, 8, 8, 4), "int8"),
        Tensor("w", (32, 3, 3, 4), "int8"),
        Tensor("b", (32,), "int32"),
    )
    conv = Operator("conv", "CONV_2D", tensors, (Tensor("y", (1, 8, 8, 32), "int8"),), 0, 0, "int8")

    assert edgetpu.place([conv]).on_accelerator == ("conv",)


def test_tensorrt_refuses_unsigned_activations_and_unknown_operators() -> None:
    placement = tensorrt.place(
        [operator("Conv", "a"), operator("Conv", "b", dtype="uint8"), operator("QLinearConv", "c")]
    )

    assert placement.on_accelerator == ("a",)
    assert "scheme tensorrt" in placement.left_out[0].reason
    assert "does not know QLinearConv" in placement.left_out[1].reason


def test_tensorrt_keeps_float_operators_on_the_gpu() -> None:
    assert tensorrt.place([operator("Softmax", dtype="float16")]).left_out == ()


def test_onnx_runtime_without_a_fusion_runs_in_float() -> None:
    placement = onnxruntime.place(
        [
            operator("Conv"),
            operator("HardSwish"),
            operator("Add", dtype="float32"),
            operator("Shape", dtype="int64"),
        ]
    )

    assert placement.on_accelerator == ("Conv", "Shape")
    assert "no integer kernel for HardSwish" in placement.left_out[0].reason
    assert "float32" in placement.left_out[1].reason


def test_litert_computes_in_the_type_of_its_tensors() -> None:
    placement = litert.place([operator("CONV_2D"), operator("SOFTMAX", dtype="float32")])

    assert placement.on_accelerator == ("CONV_2D",)
    assert placement.left_out[0].name == "SOFTMAX"


@pytest.mark.skipif("EDGEOPT_DATA" not in os.environ, reason="EDGEOPT_DATA names no folder of real data")
def test_edge_tpu_table_is_the_published_one() -> None:
    rows = list(csv.DictReader((Path(os.environ["EDGEOPT_DATA"]) / "devices/edgetpu_ops.csv").open()))
    verified = {row["op"] for row in rows if row["verified"] == "yes"}
    names = {"LSTM": "UNIDIRECTIONAL_SEQUENCE_LSTM"}  # the table's word and LiteRT's
    taken = {
        row["op"]
        for row in rows
        if edgetpu.place([operator(names.get(row["op"], row["op"]), shape=(1, 8))]).on_accelerator
    }

    assert taken == verified


@pytest.mark.skipif("EDGEOPT_DATA" not in os.environ, reason="EDGEOPT_DATA names no folder of real data")
def test_edge_tpu_placement_is_the_compilers() -> None:
    """The files were compiled by Google's compiler, which said how many operators it mapped."""
    from edgeopt_converters import litert_graph

    folder = Path(os.environ["EDGEOPT_DATA"]) / "coral"
    for row in csv.DictReader((folder / "placement.csv").open()):
        operators = litert_graph.operators((folder / row["model"]).read_bytes())

        mapped = len(edgetpu.place(operators).on_accelerator)

        assert len(operators) == int(row["operators"])
        if any(operator.type.startswith("RESIZE") for operator in operators):
            assert mapped >= int(row["operators_on_edge_tpu"]), row[
                "model"
            ]  # the best case, as its docstring says
        else:
            assert mapped == int(row["operators_on_edge_tpu"]), row["model"]
