# SPDX-License-Identifier: Apache-2.0
"""mAP by hand, and the same as COCO's own code to the last bits.

`pip install pycocotools` makes the comparison run on every scene; without it, figures noted from it
(pycocotools 2.0.11) are compared.
"""

import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest

from edgeopt.evaluate.average_precision import (
    THRESHOLDS,
    Detections,
    Objects,
    match,
    mean_average_precision,
)

UNIT = np.array([0.0, 0.0, 10.0, 10.0])


def scenes(seed: int, images: int = 40, classes: int = 5) -> tuple[list[Detections], list[Objects]]:
    """Draw objects, and detections that are objects moved a little, duplicates and plain errors; many scores tie."""
    rng = np.random.default_rng(seed)
    found, truth = [], []
    for _ in range(images):
        objects = rng.integers(0, 12)
        corner, size = rng.uniform(0, 80, (objects, 2)), rng.uniform(5, 40, (objects, 2))
        boxes = np.concatenate((corner, corner + size), 1)
        named = rng.integers(0, classes, objects)
        truth.append(Objects(boxes, named, rng.random(objects) < 0.1))
        copies = np.repeat(np.arange(objects), rng.integers(0, 4, objects))
        moved = boxes[copies] + rng.normal(0, 2.5, (len(copies), 4))
        called = np.where(
            rng.random(len(copies)) < 0.85, named[copies], rng.integers(0, classes, len(copies))
        )
        noise = rng.integers(0, 30)
        start = rng.uniform(0, 90, (noise, 2))
        wrong = np.concatenate((start, start + rng.uniform(2, 30, (noise, 2))), 1)
        corners = np.concatenate((moved, wrong))
        corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2] + 0.1)
        scores = np.round(np.concatenate((rng.beta(4, 2, len(copies)), rng.beta(2, 4, noise))), 1)
        kinds = np.concatenate((called, rng.integers(0, classes, noise))).astype(np.int64)
        found.append(Detections(corners, scores, kinds))
    return found, truth


def _image(boxes: list[np.ndarray], scores: list[float], classes: list[int]) -> Detections:
    return Detections(np.reshape(boxes, (-1, 4)), np.asarray(scores), np.asarray(classes, np.int64))


def _objects(boxes: list[np.ndarray], classes: list[int], crowd: list[bool] | None = None) -> Objects:
    return Objects(
        np.reshape(boxes, (-1, 4)),
        np.asarray(classes, np.int64),
        np.asarray(crowd or [False] * len(classes), bool),
    )


def _map(found: list[Detections], truth: list[Objects], **options: int) -> tuple[float, float]:
    matches = match(found, truth, **options)  # type: ignore[arg-type]
    every = np.ones(len(truth))
    return mean_average_precision(matches, every), mean_average_precision(matches, every, 1)


def _coco(found: list[Detections], truth: list[Objects], most: int) -> tuple[float, float]:
    """COCO's own code."""
    coco = pytest.importorskip("pycocotools.coco").COCO()
    evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval

    def box(corners: np.ndarray) -> list[float]:
        return [float(corners[0]), float(corners[1]), *map(float, corners[2:] - corners[:2])]

    objects = [
        {"image_id": image, "category_id": int(kind), "iscrowd": int(crowd), "bbox": box(b), "area": 1.0}
        for image, shown in enumerate(truth, 1)
        for b, kind, crowd in zip(shown.boxes, shown.classes, shown.crowd, strict=True)
    ]
    said = [
        {"image_id": image, "category_id": int(kind), "score": float(score), "bbox": box(b)}
        for image, seen in enumerate(found, 1)
        for b, score, kind in zip(seen.boxes, seen.scores, seen.classes, strict=True)
    ]
    coco.dataset = {
        "images": [{"id": image} for image in range(1, len(truth) + 1)],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(objects, 1)],
        "categories": [{"id": kind} for kind in sorted({entry["category_id"] for entry in objects})],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        run = evaluation(coco, coco.loadRes(said), "bbox")
        run.params.maxDets = [1, 2, most]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 2]
    return tuple(float(part[part > -1].mean()) for part in (precision, precision[0]))  # type: ignore[return-value]


def test_average_precision_by_hand() -> None:
    truth = [_objects([UNIT, UNIT + 20], [0, 0])]
    found = [_image([UNIT, UNIT + 50, UNIT + 20], [0.9, 0.8, 0.7], [0, 0, 0])]
    # Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1: 1 for the recalls 0 to 0.50, 2/3 for 0.51 to 1.
    assert _map(found, truth) == pytest.approx(((51 + 50 * 2 / 3) / 101,) * 2)


def test_an_overlap_counts_up_to_its_threshold() -> None:
    shifted = UNIT + np.array([0.0, 0.0, 0.0, -3.6])  # 64 of 100
    assert _map([_image([shifted], [0.5], [3])], [_objects([UNIT], [3])]) == pytest.approx((3 / 10, 1.0))


def test_the_mean_is_over_classes_that_have_objects() -> None:
    truth = [_objects([UNIT, UNIT + 20], [0, 1])]
    found = [_image([UNIT, UNIT + 20], [0.9, 0.8], [0, 7])]
    assert _map(found, truth) == pytest.approx((0.5, 0.5))


def test_an_object_is_found_once_and_the_better_score_goes_first() -> None:
    truth = [_objects([UNIT], [0]), _objects([UNIT], [0])]
    found = [_image([UNIT, UNIT], [0.6, 0.9], [0, 0]), _image([UNIT], [0.7], [0])]
    # Right, right, wrong: the duplicate costs nothing behind full recall.
    assert _map(found, truth) == pytest.approx((1.0, 1.0))
    found = [_image([UNIT, UNIT], [0.8, 0.9], [0, 0]), _image([UNIT], [0.7], [0])]
    assert _map(found, truth) == pytest.approx(((51 + 50 * 2 / 3) / 101,) * 2)


def test_crowds_excuse_what_falls_into_them_and_ask_for_nothing() -> None:
    crowd = np.array([100.0, 100.0, 200.0, 200.0])
    truth = [_objects([crowd, UNIT], [0, 0], [True, False])]
    inside = [crowd * 0 + [100, 100, 120, 120], crowd * 0 + [150, 150, 180, 160]]
    assert _map([_image([*inside, UNIT], [0.9, 0.8, 0.7], [0, 0, 0])], truth) == pytest.approx((1.0, 1.0))


def test_only_the_best_detections_of_an_image_count() -> None:
    truth = [_objects([UNIT], [0])]
    found = [_image([UNIT + 50, UNIT], [0.9, 0.8], [0, 0])]
    assert _map(found, truth, max_detections=1) == (0.0, 0.0)
    assert _map(found, truth, max_detections=2) == pytest.approx((0.5, 0.5))


def test_figures_noted_from_coco() -> None:
    found, truth = scenes(0)
    assert _map(found, truth) == pytest.approx((0.17095728264553434, 0.4250834771892005), rel=1e-12)
    assert _map(found, truth, max_detections=3) == pytest.approx(
        (0.15938761550438185, 0.3996748837856025), rel=1e-12
    )


@pytest.mark.parametrize("seed", range(12))
def test_every_scene_is_as_coco_has_it(seed: int) -> None:
    most = (100, 3, 10)[seed % 3]
    found, truth = scenes(seed, 5 + 3 * seed, 1 + seed % 7)
    assert _map(found, truth, max_detections=most) == pytest.approx(_coco(found, truth, most), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_weighing_an_image_twice_is_having_it_twice(seed: int) -> None:
    found, truth = scenes(seed, 12)
    rng = np.random.default_rng(seed)
    # Without ties: between copies of an image the order of equal scores is another one.
    found = [replace(one, scores=rng.random(len(one.scores))) for one in found]
    weights = rng.integers(0, 4, 12)
    often = np.repeat(np.arange(12), weights)
    for first in (None, 1):
        weighed = mean_average_precision(match(found, truth), weights.astype(float), first)
        drawn = match([found[i] for i in often], [truth[i] for i in often])
        assert weighed == pytest.approx(mean_average_precision(drawn, np.ones(len(often)), first), rel=1e-9)


def test_images_without_objects_leave_no_figure() -> None:
    matches = match([_image([UNIT], [0.5], [0])] * 2, [_objects([UNIT], [0]), _objects([], [])])
    assert np.isnan(mean_average_precision(matches, np.array([0.0, 2.0])))
    assert len(THRESHOLDS) == 10
