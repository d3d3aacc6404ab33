# SPDX-License-Identifier: Apache-2.0
"""A row in a few numbers: what its inputs look like, and how sure the model was of its answer.

Numbers of an input: mean and deviation by channel, and how rough it is (mean step between neighbours over the deviation:
noise is rough, blur is smooth). Of scores: the highest probability, its margin to the second, the entropy.

Everything is in the signature's space, so that variants of a package, and the host that built it, give the same numbers.
At most `MAX_VALUES` of an input are looked at, whole lines evenly spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeopt_wire.manifest import Manifest
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray]

MAX_VALUES = 8192
MAX_CHANNELS = 16
"""Inputs with more channels are looked at as one."""
MAX_INPUTS = 8
_SUM_TOLERANCE = 0.02  # of probabilities, which int8 outputs round


def features_of(manifest: Manifest, inputs: Arrays, outputs: Arrays) -> dict[str, float]:
    """The numbers of the first row of a request; those that are not finite are left out."""
    found: dict[str, float] = {}
    for spec in manifest.signature_inputs[:MAX_INPUTS]:
        if spec.name in inputs and inputs[spec.name].dtype.kind in "fiu" and inputs[spec.name].size:
            found |= of_input(spec, inputs[spec.name])
    scores = scores_name(manifest)
    if scores in outputs and outputs[scores].size:
        found |= of_scores(outputs[scores], is_classifier=manifest.postprocess.get("kind") != "detect")
    return {name: value for name, value in found.items() if math.isfinite(value)}


def scores_name(manifest: Manifest) -> str:
    """The output that holds a classifier's or detector's scores, empty for models of other kinds."""
    first = manifest.signature_outputs[0]
    said = manifest.postprocess
    kind = said.get("kind", "classify") if said else ""
    if kind == "detect":
        return str(said.get("scores", ""))
    if kind == "classify":
        return str(said.get("output", first.name))
    metrics = {variant.quality.metric for variant in manifest.variants if variant.quality}
    is_classifier = bool(manifest.labels) or bool(metrics & {"top1", "top5", "accuracy"})
    return first.name if not kind and is_classifier and math.prod(first.shape[1:]) > 1 else ""


def of_input(spec: TensorSpec, array: np.ndarray) -> dict[str, float]:
    """Numbers of the first row of one input, named `<input>.<what>[.<channel>]`."""
    import numpy as np

    lines = _lines(spec, array)
    values = lines.astype(np.float32, copy=False)
    flat = values.reshape(len(values), -1)
    mean, std = flat.mean(axis=1), flat.std(axis=1)
    if len(values) == 1:
        found = {f"{spec.name}.mean": float(mean[0]), f"{spec.name}.std": float(std[0])}
    else:
        found = {f"{spec.name}.mean.{c}": float(value) for c, value in enumerate(mean)}
        found |= {f"{spec.name}.std.{c}": float(value) for c, value in enumerate(std)}
    if values.shape[-1] > 1 and array.dtype.kind == "f":
        step = float(np.abs(np.diff(values, axis=-1)).mean())
        found[f"{spec.name}.rough"] = step / max(float(std.mean()), 1e-9)
    return found


def of_scores(array: np.ndarray, *, is_classifier: bool = True) -> dict[str, float]:
    """How sure the first row's scores are; a classifier's that are no probabilities go through a softmax."""
    import numpy as np

    scores = array[0].reshape(-1).astype(np.float64)
    if not is_classifier:
        return {"confidence.top1": float(scores.max())}
    if scores.size < 2:
        return {}
    if scores.min() < -_SUM_TOLERANCE or abs(scores.sum() - 1) > _SUM_TOLERANCE:
        scores = np.exp(scores - scores.max())
    shares = np.clip(scores / scores.sum(), 0, 1)
    second, first = np.partition(shares, -2)[-2:]
    known = shares[shares > 0]
    entropy = float(-(known * np.log(known)).sum() / math.log(shares.size))
    return {
        "confidence.top1": float(first),
        "confidence.margin": float(first - second),
        "confidence.entropy": entropy,
    }


def _lines(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """The first row as (channels, lines, values in a line), thinned to `MAX_VALUES` by leaving lines out."""
    row = array[0] if array.ndim > 1 else array
    if row.ndim == 3 and spec.layout == "NHWC" and row.shape[2] <= MAX_CHANNELS:
        row = row[:: _step(row.shape[0], row.size)].transpose(2, 0, 1)
    elif row.ndim == 3 and row.shape[0] <= MAX_CHANNELS:
        row = row[:, :: _step(row.shape[1], row.size)]
    else:
        flat = row.reshape(-1)
        row = flat[: MAX_VALUES * 8].reshape(1, 1, -1)
    return row


def _step(lines: int, size: int) -> int:
    return max(1, min(lines, -(-size // MAX_VALUES)))
