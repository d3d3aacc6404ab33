# SPDX-License-Identifier: Apache-2.0
"""A sketch gives any quantile within 1 %, however it was put together, and says when bytes are none."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt_wire.sketch import ACCURACY, Sketch

VALUES = st.lists(st.floats(1.0, 1e12), min_size=1, max_size=300)


def _of(values: list[float]) -> Sketch:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    return sketch


@given(VALUES, st.floats(0.01, 1.0))
def test_every_quantile_is_within_the_accuracy(values: list[float], share: float) -> None:
    exact = float(np.quantile(values, share, method="inverted_cdf"))
    found = _of(values).quantile(share)
    assert found == pytest.approx(exact, rel=ACCURACY * 1.001)


@given(VALUES, VALUES)
def test_merged_sketches_are_the_sketch_of_all(first: list[float], second: list[float]) -> None:
    merged = _of(first)
    merged.merge(_of(second))
    whole = _of([*first, *second])
    assert (merged.bins, merged.count, merged.least, merged.greatest) == (
        whole.bins,
        whole.count,
        whole.least,
        whole.greatest,
    )
    assert merged.total == pytest.approx(whole.total)


@given(VALUES)
def test_a_sketch_travels_as_json(values: list[float]) -> None:
    sketch = _of(values)
    assert Sketch.from_json(json.loads(json.dumps(sketch.to_json()))) == sketch


def test_an_empty_sketch_has_no_quantile_and_travels_too() -> None:
    assert Sketch().quantile(0.5) is None
    assert Sketch.from_json(Sketch().to_json()) == Sketch()


@pytest.mark.parametrize(
    "change",
    [
        {"bins": None},
        {"bins": [[1, -1]]},
        {"bins": [[1, 5]]},
        {"count": 7},
        {"accuracy": 0.5},
        {"bins": [["x", 1]]},
        {"bins": [[]]},
    ],
)
def test_what_does_not_add_up_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"sketch|add up|invalid|unpack"):
        Sketch.from_json({**_of([1.0, 2.0]).to_json(), **change})
