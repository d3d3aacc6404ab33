# SPDX-License-Identifier: Apache-2.0
"""Two models side by side: figures by hand, in steps where quantized, and what cannot be compared."""

import math

import numpy as np
import pytest

from edgeopt.evaluate.fidelity import SQNR_CEILING_DB
from edgeopt.evaluate.outputs import Outputs
from edgeopt.evaluate.parity import compare_models
from edgeopt_wire.document import to_bytes
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import Affine, TensorSpec


def _outputs(**named: object) -> Outputs:
    return Outputs({name: np.asarray(array, np.float32) for name, array in named.items()}, None)


def test_differences_by_hand_in_steps_of_the_quantized_one() -> None:
    one = _outputs(y=[[0.0, 0.5], [1.0, 0.25]])
    two = _outputs(y=[[0.0, 0.75], [0.0, 0.25]])
    spec = TensorSpec("y", (1, 2), "int8", affine=Affine(0.25, 0))
    for specs in (((), (spec,)), ((spec,), ())):
        found = compare_models(one, two, *specs).differences[0]
        assert (found.max_abs, found.mean_abs, found.p999_abs, found.equal) == (1.0, 0.3125, 1.0, 0.5)
        assert (found.step, found.max_steps, found.p999_steps, found.within_one_step) == (
            0.25,
            4.0,
            4.0,
            0.75,
        )
        assert (found.agreement, found.sqnr_db) == (0.5, round(10 * math.log10(1.3125 / 1.0625), 1))


def test_the_quantile_leaves_one_in_a_thousand_out() -> None:
    apart = np.zeros((100, 20))
    apart[3, 7] = 9.0
    found = compare_models(_outputs(y=apart), _outputs(y=np.zeros((100, 20)))).differences[0]
    assert (found.max_abs, found.p999_abs, found.step, found.max_steps) == (9.0, 0.0, None, None)


def test_outputs_with_other_names_are_matched_by_place() -> None:
    one = _outputs(a=np.zeros((2, 3)), b=np.ones((2, 1)))
    by_place = compare_models(one, _outputs(c=np.zeros((2, 3)), d=np.ones((2, 1))))
    by_name = compare_models(one, _outputs(b=np.ones((2, 1)), a=np.zeros((2, 3))))
    assert (by_place.matched_by, by_name.matched_by) == ("place", "name")
    assert by_place.is_equal
    assert by_name.is_equal
    assert by_place.differences[1].other_name == "d"
    assert by_place.differences[0].sqnr_db == SQNR_CEILING_DB


def test_the_same_infinity_is_equal_and_another_is_counted() -> None:
    one, two = _outputs(y=[[np.inf, np.nan, 1.0, 2.0]]), _outputs(y=[[np.inf, np.nan, np.nan, 2.5]])
    assert compare_models(one, one).is_equal
    found = compare_models(one, two)
    assert not found.is_equal
    assert (found.differences[0].not_finite, found.differences[0].max_abs) == (1, 0.5)
    assert found.differences[0].sqnr_db == -SQNR_CEILING_DB
    assert b"differences" in to_bytes(found)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"y": np.zeros((3, 2))}, "found 2 samples of y and 3 samples of y"),
        ({"y": np.zeros((2, 2)), "z": np.zeros((2, 2))}, "samples of y, z"),
        ({"y": np.zeros((2, 4))}, r"the shape \(2, 2\), 'y' of the other model \(2, 4\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compare_models(_outputs(y=np.zeros((2, 2))), _outputs(**other))
