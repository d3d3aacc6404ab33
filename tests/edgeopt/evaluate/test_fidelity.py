# SPDX-License-Identifier: Apache-2.0
"""Nearness without labels: figures by hand, clipping where there is some and nowhere else."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgeopt.evaluate.fidelity import SQNR_CEILING_DB, Fidelity, divergence, measure_fidelity
from edgeopt.evaluate.metrics import compare
from edgeopt.evaluate.outputs import Outputs
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import Affine, TensorSpec


def _outputs(**named: object) -> Outputs:
    return Outputs({name: np.asarray(array, np.float32) for name, array in named.items()}, None)


def _quantize(values: np.ndarray, scale: float, zero_point: int = 0) -> np.ndarray:
    """What an int8 output says of float values."""
    integers = np.clip(np.rint(values / scale) + zero_point, -128, 127)
    return ((integers - zero_point) * scale).astype(np.float32)


def test_every_figure_by_hand() -> None:
    base = _outputs(a=[[3, 4], [1, 0]], b=[[[1.0]], [[2.0]]])
    found = measure_fidelity(base, _outputs(a=[[3, 4], [0, 1]], b=[[[1.0]], [[2.5]]]))
    a, b = found.outputs
    assert (a.cosine, a.largest_error, a.largest_at, a.agreement) == (0.5, 1.0, (1, 0), 0.5)
    assert (b.cosine, b.largest_error, b.largest_at, b.agreement) == (None, 0.5, (1, 0, 0), None)
    assert a.sqnr_db == round(10 * math.log10(26 / 2), 1)
    assert found.sqnr_db == round(10 * math.log10(31 / 2.25), 1)
    assert (found.cosine, found.agreement, found.samples, found.not_finite) == (0.5, 0.5, 2, 0)


def test_divergence_by_hand() -> None:
    # Softmax of (ln 3, 0) is (3/4, 1/4), of (0, 0) it is (1/2, 1/2).
    logits = divergence(np.array([[math.log(3), 0]]), np.array([[0.0, 0.0]]))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert logits == pytest.approx(expected)
    # Rows that are probabilities are taken as such, not through another softmax.
    assert divergence(np.array([[0.75, 0.25]]), np.array([[0.5, 0.5]])) == pytest.approx(expected, rel=1e-5)


def test_an_integer_softmax_that_says_zero_costs_much_but_not_infinity() -> None:
    found = divergence(np.array([[0.9, 0.1]]), np.array([[1.0, 0.0]]))
    assert 1 < found < 2


@settings(deadline=None)
@given(
    logits=arrays.arrays(np.float32, (4, 5), elements=st.floats(-30, 30, width=32)),
    noise=arrays.arrays(np.float32, (4, 5), elements=st.floats(-3, 3, width=32)),
    shift=st.floats(-20, 20, width=32),
)
def test_divergence_is_never_negative_and_blind_to_a_common_shift(
    logits: np.ndarray, noise: np.ndarray, shift: float
) -> None:
    other = logits + noise
    found = divergence(logits, other)
    assert found >= 0
    assert divergence(logits, logits) == pytest.approx(0, abs=1e-9)
    if logits.min() < 0:  # else the rows might be probabilities
        assert divergence(logits, other.astype(np.float64) + shift) == pytest.approx(found, abs=1e-4)


def test_clipping_is_seen_with_and_without_the_outputs_scale() -> None:
    base = np.random.default_rng(0).normal(size=(400, 10)).astype(np.float32)
    scale = 2.0 / 127
    spec = TensorSpec("y", (1, 10), "int8", affine=Affine(scale, 0))
    candidate = _quantize(base, scale)
    truth = float(((base > 127 * scale + scale) | (base < -128 * scale - scale)).any(1).mean())
    assert truth > 0.2
    for specs in ((spec,), ()):
        found = measure_fidelity(_outputs(y=base), _outputs(y=candidate), specs)
        assert found.clipped_share == pytest.approx(truth, abs=0.0026), specs


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda x: np.maximum(x, 0), "rectified: zero is shared, but nothing is below"),
        (lambda x: np.clip(x, 0, 1), "clipped by the model itself"),
        (lambda x: 1 / (1 + np.exp(-4 * x)), "sigmoid"),
        (
            lambda x: np.exp(8 * x) / np.exp(8 * x).sum(1, keepdims=True),
            "softmax, which int8 ends at 255/256",
        ),
        (lambda x: x, "plain"),
    ],
)
def test_what_is_in_range_is_not_called_clipped(make: object, why: str) -> None:
    base = make(np.random.default_rng(1).normal(size=(300, 10))).astype(np.float32)  # type: ignore[operator]
    low, high = min(0.0, float(base.min())), float(base.max())
    scale = 1 / 256 if "softmax" in why else (high - low) / 255
    zero_point = -128 if "softmax" in why else -128 - round(low / scale)
    candidate = _quantize(base, scale, zero_point)
    spec = TensorSpec("y", (1, 10), "int8", affine=Affine(scale, zero_point))
    for specs in ((spec,), ()):
        assert measure_fidelity(_outputs(y=base), _outputs(y=candidate), specs).clipped_share == 0, (
            why,
            specs,
        )
    half = _outputs(y=base.astype(np.float16))
    assert measure_fidelity(_outputs(y=base), half).clipped_share == 0, why


def test_a_candidate_without_numbers_is_counted_and_ranks_last() -> None:
    found = measure_fidelity(
        _outputs(y=np.ones((3, 4))), _outputs(y=[[1] * 4, [np.nan, 1, np.inf, 1], [1] * 4])
    )
    assert (found.not_finite, found.sqnr_db, found.cosine, found.kl) == (2, -SQNR_CEILING_DB, None, None)
    assert from_bytes(Fidelity, to_bytes(found)) == found
    with pytest.raises(RecipeError, match="NaN or infinity in output 'y'"):
        measure_fidelity(_outputs(y=[[np.nan]]), _outputs(y=[[0.0]]))


def test_outputs_of_other_shapes_or_names_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"expected the baseline's shape \(2, 3\), found \(2, 4\)"):
        measure_fidelity(_outputs(y=np.zeros((2, 3))), _outputs(y=np.zeros((2, 4))))
    with pytest.raises(RecipeError, match=r"'y': expected the baseline's shape .* found none"):
        measure_fidelity(_outputs(y=np.zeros((2, 3))), _outputs(z=np.zeros((2, 3))))


def test_zero_rows_agree_with_zero_rows_only() -> None:
    found = measure_fidelity(_outputs(y=[[0, 0], [0, 0]]), _outputs(y=[[0, 0], [0, 1]]))
    assert found.cosine == 0.5


def test_labels_that_are_no_classes_leave_the_comparison_without_top1() -> None:
    outputs = Outputs({"y": np.eye(3, dtype=np.float32)}, np.array([0.5, 1.0, 2.0]))
    assert compare(outputs, outputs).metric == ""
