# SPDX-License-Identifier: Apache-2.0
"""Neighbours and retrieval by hand, pooling with a mask, and too little data."""

import numpy as np
import pytest

from edgeopt.evaluate.outputs import Outputs
from edgeopt.evaluate.scores import Scores
from edgeopt.evaluate.tasks import load_task
from edgeopt.evaluate.tasks.embeddings import nearest
from edgeopt_wire.errors import RecipeError


def _angles(*degrees: float) -> np.ndarray:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def _score(said: np.ndarray, base: np.ndarray, labels: object = None, **options: object) -> Scores:
    known = None if labels is None else np.asarray(labels)
    return load_task("embeddings", options).score(Outputs({"y": said}, known), Outputs({"y": base}, known))


def test_cosine_and_neighbours_by_hand() -> None:
    base = _angles(0, 10, 30, 90)
    moved = _angles(0, 10, 60, 90)  # the third now lies nearer to the fourth than to the second
    found = _score(moved, base, k=1)
    assert found.find("cosine").value == pytest.approx((3 + np.cos(np.deg2rad(30))) / 4)
    assert found.find("neighbours_at_1").value == 3 / 4
    assert _score(3 * base, base, k=2).find("neighbours_at_2").value == 1


def test_retrieval_recall_comes_first_and_lonely_labels_are_left_out() -> None:
    vectors = _angles(0, 5, 20, 28, 170)
    found = _score(vectors, vectors, [7, 7, 8, 7, 9], k=1)
    # 0 and 5 degrees find each other, 28 finds 20 of another label; 8 and 9 stand alone.
    assert found.find().name == "recall_at_1"
    assert found.find().value == pytest.approx(2 / 3)
    assert found.find().is_right_or_wrong


def test_neighbours_are_those_of_scikit_learn() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    vectors = np.random.default_rng(0).normal(size=(300, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    search = neighbors.NearestNeighbors(n_neighbors=5, metric="cosine").fit(vectors)
    np.testing.assert_array_equal(nearest(vectors, 5), search.kneighbors(return_distance=False))


def test_pooling_takes_the_first_token_or_the_mean_of_the_marked() -> None:
    tokens = np.random.default_rng(1).normal(size=(4, 3, 5)).astype(np.float32)
    mask = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 0]])
    mean = np.stack([row[marks == 1].mean(0) for row, marks in zip(tokens, mask, strict=True)])
    marked = Outputs({"y": tokens}, None, tuple({"mask": marks, "group": np.array([0])} for marks in mask))
    task = load_task("embeddings", {"k": 1, "pooling": "mean"})
    pooled = Outputs({"y": mean}, None)
    cosine = task.score(marked, marked).find("cosine").value
    assert cosine == pytest.approx(1)
    from edgeopt.evaluate.tasks import embeddings

    found = embeddings._unit(marked, embeddings.Options(k=1, pooling="mean"))
    expected = embeddings._unit(pooled, embeddings.Options(k=1))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    first = embeddings._unit(marked, embeddings.Options(k=1, pooling="first"))
    np.testing.assert_allclose(
        first, embeddings._unit(Outputs({"y": tokens[:, 0]}, None), embeddings.Options())
    )


@pytest.mark.parametrize(
    ("shape", "labels", "options", "message"),
    [
        ((5, 4), None, {}, "10 neighbours need more than 10 samples, found 5; lower `k`"),
        ((5, 4), [0, 1, 2, 3, 4], {"k": 1}, "all labels stand alone"),
        ((5, 4), [[0], [1], [2], [3], [4]], {"k": 1}, r"found int64 \(5, 1\)"),
        ((5, 4, 3), None, {"k": 1}, "one row a sample"),
        ((5, 4), None, {"k": 1, "pooling": "mean"}, r"an output \(samples, tokens, width\), found \(5, 4\)"),
        ((5, 4), None, {"pooling": "max"}, "unknown pooling 'max'"),
        ((5, 4), None, {"k": 0}, "k must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(
    shape: tuple[int, ...], labels: object, options: dict[str, object], message: str
) -> None:
    array = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    with pytest.raises(RecipeError, match=message):
        _score(array, array, labels, **options)
