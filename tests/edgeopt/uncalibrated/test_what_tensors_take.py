# SPDX-License-Identifier: Apache-2.0
"""What a tensor takes follows from batch normalization and the graph, without running the model."""

import math

import numpy as np
import onnx
import onnx.parser
import pytest

from edgeopt.uncalibrated.propagate import Reading, propagate
from edgeopt.uncalibrated.spread import REACH, Spread

CHANNELS = 4


def read(text: str, **constants: np.ndarray) -> Reading:
    """Read a graph in ONNX's text form whose input x (1, 4, 8, 8) takes 0 to 1; `n*` are made-up normalizations."""
    rng = np.random.default_rng(0)
    values = {name: array.astype(np.float32) for name, array in constants.items()}
    for name in ("n0", "n1"):
        values[f"{name}_gamma"] = np.array([1, 2, -0.5, 0.1], np.float32)
        values[f"{name}_beta"] = np.array([0, 1, 2, -3], np.float32)
        values[f"{name}_mean"] = np.array([5, 6, 7, 8], np.float32)
        values[f"{name}_var"] = np.array([4, 4, 9, 1], np.float32)
    values.setdefault("w", rng.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32))
    program = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 18]> g (float[1,4,8,8] x) => (float y) {{ {text} }}'
    )
    program.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in values.items())
    del program.graph.output[0].type.tensor_type.shape.dim[:]
    program.graph.output[0].type.tensor_type.ClearField("shape")
    program = onnx.shape_inference.infer_shapes(program)
    share = np.linspace(0, 1, Spread.normal("x", np.zeros(1), np.ones(1)).values.shape[0])
    return propagate(program, {"x": Spread("x", share[:, None])})


NORM = "BatchNormalization(c, n0_gamma, n0_beta, n0_mean, n0_var)"
STEM = f"c = Conv<pads=[1,1,1,1]>(x, w) b = {NORM}"


def test_batch_normalization_promises_its_output_and_knows_its_input() -> None:
    found = read(f"{STEM} y = Relu(b)")
    np.testing.assert_allclose(found.spreads["b"].mean, [0, 1, 2, -3], atol=1e-9)
    np.testing.assert_allclose(np.sqrt(found.spreads["b"].variance), [1, 2, 0.5, 0.1], rtol=1e-3)
    np.testing.assert_allclose(found.spreads["c"].mean, [5, 6, 7, 8])
    assert found.spreads["b"].ends == (1 - 2 * REACH, 1 + 2 * REACH)
    assert (found.norms, found.layers, found.assumed) == (1, 1, ())


@pytest.mark.parametrize("high", [6.0, math.inf], ids=["relu6", "relu"])
def test_moments_behind_a_clip_are_those_of_the_clipped_normal(high: float) -> None:
    """Nagel et al. 2019, appendix C: the closed form for ReLU and ReLU6."""
    text = "y = Relu(b)" if math.isinf(high) else "y = Clip(b, low, high)"
    found = read(f"{STEM} {text}", low=np.array(0), high=np.array(6)).spreads["y"]
    for channel, (mean, deviation) in enumerate([(0, 1), (1, 2), (2, 0.5), (-3, 0.1)]):
        draws = np.clip(np.random.default_rng(1).normal(mean, deviation, 400_000), 0, high)
        assert found.mean[channel] == pytest.approx(draws.mean(), abs=0.01)
        assert found.variance[channel] == pytest.approx(draws.var(), abs=0.02)
    assert found.ends == (0.0, min(high, 1 + 2 * REACH))


def test_an_activation_spelled_in_four_operators_has_its_own_ends() -> None:
    found = read(
        f"{STEM} p = Add(b, three) q = Clip(p, low, high) r = Div(q, six) y = Mul(b, r)",
        three=np.array(3), low=np.array(0), high=np.array(6), six=np.array(6),
    ).spreads["y"]  # fmt: skip
    assert found.ends[0] == pytest.approx(-0.375, abs=0.005)
    assert found.ends[1] == pytest.approx(1 + 2 * REACH, rel=1e-6)


def test_what_knows_nothing_of_each_other_adds_in_squares_within_the_sum_of_the_ends() -> None:
    text = (
        f"{STEM} d = Conv<pads=[1,1,1,1]>(b, w) e = BatchNormalization(d, n1_gamma, n1_beta, n1_mean, n1_var)"
    )
    found = read(f"{text} y = Add(b, e)").spreads["y"]
    np.testing.assert_allclose(found.mean, [0, 2, 4, -6], atol=1e-6)
    np.testing.assert_allclose(np.sqrt(found.variance), np.sqrt(2) * np.array([1, 2, 0.5, 0.1]), rtol=0.05)


def test_a_gate_between_0_and_1_widens_nothing() -> None:
    text = f"{STEM} g = GlobalAveragePool(b) d = Conv(g, w1) s = Sigmoid(d) y = Mul(b, s)"
    found = read(text, w1=np.ones((CHANNELS, CHANNELS, 1, 1))).spreads
    low, high = found["b"].ends
    assert low <= found["y"].ends[0] < 0 < found["y"].ends[1] <= high


def test_layers_without_a_normalization_are_named_and_follow_from_their_weights() -> None:
    weight = np.zeros((CHANNELS, CHANNELS, 3, 3))
    weight[:, 1, 1, 1] = 3.0
    found = read(f"{STEM} y = Conv<pads=[1,1,1,1]>(b, w2, bias)", w2=weight, bias=np.ones(CHANNELS))
    np.testing.assert_allclose(found.spreads["y"].mean, 4.0)
    np.testing.assert_allclose(np.sqrt(found.spreads["y"].variance), 6.0, rtol=1e-3)
    assert found.assumed == ("y",)


def test_a_convolution_whose_relu_comes_before_its_normalization_is_not_negative() -> None:
    found = read(f"d = Conv<pads=[1,1,1,1]>(x, w) c = Relu(d) y = {NORM}").spreads
    assert found["c"].ends[0] == 0.0
    assert found["c"].ends[1] == pytest.approx(7 + 3 * REACH, rel=1e-3)


def test_after_an_operator_that_no_rule_knows_the_next_normalization_knows_again() -> None:
    found = read(
        'a = Einsum<equation="bchw->bchw">(x) c = Conv<pads=[1,1,1,1]>(a, w) b = '
        f"{NORM} y = Relu(b)"
    )  # fmt: skip
    assert "a" not in found.spreads
    assert found.spreads["y"].ends == (0.0, 1 + 2 * REACH)


def test_flattened_and_concatenated_channels_stay_apart_and_shuffled_ones_become_one() -> None:
    found = read(
        f"{STEM} k = Concat<axis=1>(b, b) f = Flatten(k) t = Transpose<perm=[0,2,3,1]>(b) y = Relu(t)"
    ).spreads
    np.testing.assert_allclose(found["k"].mean, [0, 1, 2, -3] * 2, atol=1e-9)
    assert found["f"].channels == 2 * CHANNELS * 64
    assert found["t"].channels == 1
    assert found["t"].ends == found["b"].ends
    assert found["t"].mean[0] == pytest.approx(0.0, abs=0.05)


def test_an_average_is_within_what_it_averages_and_nearer_to_its_mean() -> None:
    found = read(f"{STEM} r = Relu(b) y = GlobalAveragePool(r)").spreads
    assert found["y"].ends[0] == 0.0
    assert found["y"].ends[1] < 0.9 * found["r"].ends[1]
