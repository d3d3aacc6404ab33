# SPDX-License-Identifier: Apache-2.0
"""What a device should expect to see, taken while a package is built: the reference for drift in service.

Evaluation data is taken before calibration data: models are often trained on the latter, and surer of it than of
anything that they meet later. The first CPU variant answers; variants of one package are sure alike.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt_agent.features import features_of, scores_name
from edgeopt_agent.model import open_model
from edgeopt_wire.document import to_json
from edgeopt_wire.drift import MANIFEST_KEY, make_reference
from edgeopt_wire.errors import EdgeoptError
from edgeopt_wire.manifest import Manifest

if TYPE_CHECKING:
    from edgeopt.evaluate.samples import Samples

_log = logging.getLogger(__name__)

LEAST, MOST = 50, 512
"""Rows of a reference: fewer say too little of ten bins; more gain little (docs/monitoring.md)."""


def with_expectations(
    stage: Path, manifest: Manifest, *, evaluation: Samples | None, calibration: Samples | None
) -> Manifest:
    """Return the manifest with its statistics; as it is where there is too little real data."""
    for samples, origin in ((evaluation, "evaluation"), (calibration, "calibration")):
        if samples is not None and len(samples) >= LEAST:
            found = to_json(make_reference(_rows(stage, manifest, samples), origin))
            return replace(manifest, extra={**manifest.extra, MANIFEST_KEY: found})
    return manifest


def _rows(stage: Path, manifest: Manifest, samples: Samples) -> list[dict[str, float]]:
    here = [variant.id for variant in manifest.variants if variant.accelerator == "cpu"]
    if here and scores_name(manifest):
        try:
            with open_model(stage, manifest, here[0]) as loaded:
                return [
                    features_of(manifest, s.inputs, loaded.infer(s.inputs))
                    for s in itertools.islice(samples, MOST)
                ]
        except EdgeoptError as error:
            _log.warning("the package does not say how sure %s should be: %s", here[0], error)
    return [features_of(manifest, sample.inputs, {}) for sample in itertools.islice(samples, MOST)]
