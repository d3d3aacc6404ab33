# SPDX-License-Identifier: Apache-2.0
"""A latency that nobody measured is an estimate with an interval, or a reason why there is none."""

import pytest

from edgeopt.plan import Artifact, Candidate, make_plan
from edgeopt.predict import foresee, predict, predictions
from edgeopt.recipe import Recipe
from edgeopt_profiles.operators import Operator, Tensor
from edgeopt_profiles.profile import load_profile

PI = load_profile("raspberry-pi-4")
CANDIDATE = Candidate("litert-int8-4t", "litert-int8", "litert", 4, "cpu")
INT8 = Artifact("litert-int8", "litert", "int8")


def _convolutions(count: int, dtype: str = "int8") -> list[Operator]:
    """ONNX convolutions of 64 channels on 56 x 56 pixels: 116 million multiply-accumulates each."""
    photo, weights = (1, 64, 56, 56), (64, 64, 3, 3)
    return [
        Operator(
            f"conv{number}", "Conv", (Tensor("x", photo, dtype), Tensor("w", weights, "int8")),
            (Tensor("y", photo, dtype),), 64 * 64 * 9 * 56 * 56, 64 * 64 * 9, dtype,
        )
        for number in range(count)
    ]  # fmt: skip


def test_an_estimate_says_that_it_was_not_measured_and_what_it_rests_on() -> None:
    found = predict(PI, CANDIDATE, INT8, _convolutions(4)).estimate
    assert found is not None
    assert found.low_ns < found.latency_ns < found.high_ns
    assert found.sentence().startswith("estimated ")
    assert "not measured; it rests on 112 published latencies" in found.sentence()


def test_what_an_int8_file_leaves_in_floats_takes_longer() -> None:
    integers = predict(PI, CANDIDATE, INT8, _convolutions(8)).estimate
    mixed = predict(PI, CANDIDATE, INT8, [*_convolutions(4), *_convolutions(4, "float32")]).estimate
    assert integers is not None
    assert mixed is not None
    assert mixed.latency_ns > 1.3 * integers.latency_ns


def test_a_float_model_stands_for_the_int8_one_that_is_planned() -> None:
    found = predict(PI, CANDIDATE, INT8, _convolutions(4, "float32"), is_planned=True).estimate
    assert found == predict(PI, CANDIDATE, INT8, _convolutions(4)).estimate


@pytest.mark.parametrize(
    ("operators", "precision", "why"),
    [
        ([Operator("p", "MatMul", (Tensor("x", (128, 384), "float32"), Tensor("w", (384, 384), "int8")),
                   (Tensor("y", (128, 384), "float32"),), 18_874_368, 147_456, "int8")], "int8", "matrix products"),
        ([*_convolutions(1), Operator("l", "LSTM", (), (), 0, 0, "float32")], "int8", "LSTM"),
        (_convolutions(1), "int4-weights", "int4-weights"),
        ([], "int8", "shapes are not fixed"),
    ],
)  # fmt: skip
def test_what_published_latencies_say_nothing_of_is_not_estimated(
    operators: list[Operator], precision: str, why: str
) -> None:
    found = predict(PI, CANDIDATE, Artifact("a", "litert", precision), operators)
    assert found.estimate is None
    assert why in found.reason


def test_an_accelerator_of_which_one_network_is_published_is_not_estimated() -> None:
    jetson = load_profile("jetson-orin-nx")
    candidate = Candidate("tensorrt-int8-1t", "onnx-int8", "tensorrt", 1, "tensorrt")
    assert "fewer than three" in predict(jetson, candidate, INT8, _convolutions(4)).reason


def test_this_machine_is_measured_and_never_estimated() -> None:
    plan = make_plan(load_profile("host"), Recipe(runtimes=("onnxruntime",)))
    assert foresee(plan, _convolutions(4)) == {}
    assert predictions(plan, {"onnx-fp32": _convolutions(4)}) == {}


def test_every_candidate_of_a_board_is_foreseen() -> None:
    plan = make_plan(PI, Recipe())
    found = foresee(plan, _convolutions(4, "float32"))
    assert found.keys() == {candidate.id for candidate in plan.candidates}
    assert all(entry.estimate for entry in found.values())
