# SPDX-License-Identifier: Apache-2.0
"""A model's outputs become classes, boxes and vectors, checked against other ways to say the same."""

import numpy as np
import pytest

from edgeopt_agent.answers import finish, suppress
from edgeopt_wire.errors import RecipeError


def test_classes_come_best_first_with_their_labels_and_ties_in_order() -> None:
    scores = np.float32([[0, 3, 3, 1], [5, 4, 3, 2]])
    found = finish("classify", {"top": 2}, {"y": scores}, {}, ["a", "b"])
    assert found["top_index"].tolist() == [[1, 2], [0, 1]]
    assert found["top_score"].tolist() == [[3, 3], [5, 4]]
    assert found["top_label"].tolist() == [[b"b", b""], [b"a", b"b"]]


def test_softmax_adds_up_to_one_and_stands_large_values() -> None:
    found = finish("classify", {"top": 3, "softmax": True}, {"y": np.float32([[1000, 999, 0]])}, {})
    assert found["top_score"].sum() == pytest.approx(1)
    assert found["top_score"][0, 0] == pytest.approx(1 / (1 + np.exp(-1)), rel=1e-5)


def slow_suppression(boxes: np.ndarray, scores: np.ndarray, limit: float) -> list[int]:
    """The definition, box by box."""
    kept: list[int] = []
    for at in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        for better in kept:
            a, b = boxes[at], boxes[better]
            width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
            height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
            if width * height > limit * union:
                break
        else:
            kept.append(at)
    return kept


def test_suppression_keeps_what_the_definition_keeps() -> None:
    rng = np.random.default_rng(0)
    for limit in (0.2, 0.5, 0.8):
        corners = rng.uniform(0, 10, (60, 2)).astype(np.float32)
        boxes = np.concatenate([corners, corners + rng.uniform(1, 6, (60, 2)).astype(np.float32)], axis=1)
        scores = rng.uniform(size=60).astype(np.float32)
        assert suppress(boxes, scores, limit).tolist() == slow_suppression(boxes, scores, limit)


def test_a_detector_gives_boxes_of_every_class_best_first() -> None:
    boxes = np.float32([[[5, 5, 4, 4], [5.2, 5, 4, 4], [20, 20, 2, 2]]])
    scores = np.float32([[[0.9, 0.1], [0.8, 0.6], [0.1, 0.7]]])
    keys = {"kind": "detect", "boxes": "b", "scores": "s", "format": "cxcywh"}
    found = finish("detect", keys, {"b": boxes, "s": scores}, {}, ["cat", "dog"])
    assert found["labels"].tolist() == [b"cat", b"dog", b"dog"]
    np.testing.assert_allclose(found["scores"], [0.9, 0.7, 0.6])
    np.testing.assert_allclose(found["boxes"][0], [3, 3, 7, 7])
    none = finish("detect", {**keys, "score_threshold": 0.99}, {"b": boxes, "s": scores}, {})
    assert none["boxes"].shape == (0, 4)


def test_pooling_leaves_padding_out_and_vectors_have_length_one() -> None:
    tokens = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    mask = np.int64([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = finish("embed", {"pool": "mean"}, {"y": tokens}, {"attention_mask": mask})["embedding"]
    expected = tokens[0, :2].mean(axis=0)
    np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "keys", "says"),
    [("clasify", {}, "classify"), ("classify", {"tpo": 1}, "top"), ("classify", {"output": "z"}, "output"),
     ("detect", {}, "output"), ("embed", {"pool": "max"}, "mean"),
     ("detect", {"boxes": "y", "scores": "y"}, "boxes")],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused_with_the_known_ones(
    kind: str, keys: dict[str, object], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        finish(kind, keys, {"y": np.zeros((1, 4), np.float32)}, {})
