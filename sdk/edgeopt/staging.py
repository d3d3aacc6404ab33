# SPDX-License-Identifier: Apache-2.0
"""The folder that a package is made of: files in their places, every candidate described, what ships packed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.artifacts import Made, places_of, tool_versions
from edgeopt.package import GOLDEN_INPUTS, file_entries, write_package
from edgeopt.plan import BASELINE, MIN_SQNR_DB, Candidate, Plan
from edgeopt.provenance import MAX_PROVENANCE_BYTES, PROVENANCE_PATH, envelope
from edgeopt.reporting import repeatable
from edgeopt.request import BuildRequest, Loaded
from edgeopt.served_package import lay_out, lay_out_preprocess, manifest_extra
from edgeopt.validate import Validation
from edgeopt_wire.document import canonical_bytes, to_bytes, to_json
from edgeopt_wire.manifest import Compatible, Manifest, Provenance, Variant

if TYPE_CHECKING:
    from edgeopt.report.document import BuildReport


def lay_out_package(
    stage: Path, plan: Plan, made: Mapping[str, Made], loaded: Loaded, request: BuildRequest
) -> Manifest:
    """Lay out model files and golden samples, and describe every candidate, shipped or not."""
    recipe, source = request.recipe, loaded.source
    places = places_of(made)
    for name, place in places.items():
        target = stage / place
        target.parent.mkdir(parents=True, exist_ok=True)
        lay_out(made[name].file, target, recipe.serving)
    if loaded.labels:
        (stage / "labels.txt").write_text("\n".join(loaded.labels) + "\n", encoding="utf-8")
    preprocess = lay_out_preprocess(stage, loaded.preprocess, recipe.preprocess or source.preprocess)
    provenance = Provenance(
        source_sha256=source.sha256,
        recipe_sha256=recipe.digest(),
        calibration_sha256=loaded.calibration.digest if loaded.calibration else "",
        evaluation_sha256=loaded.evaluation.digest if loaded.evaluation else "",
        tools=tool_versions(),
    )
    profile = plan.device
    return Manifest(
        name=source.model.name,
        version=recipe.version or _version(provenance, profile.id),
        device=profile.id,
        compatible=Compatible(tuple(profile.device_classes), tuple(profile.architectures)),
        signature_inputs=source.model.inputs,
        signature_outputs=source.model.outputs,
        variants=tuple(
            _variant(candidate, plan, made[candidate.artifact], places[candidate.artifact])
            for candidate in plan.candidates
        ),
        files=file_entries(stage, files_of(stage)),
        golden_inputs=GOLDEN_INPUTS,
        baseline={"artifact": BASELINE, "file_bytes": made[BASELINE].size_bytes},
        provenance=provenance,
        labels="labels.txt" if loaded.labels else "",
        preprocess=preprocess,
        postprocess=dict(recipe.postprocess),
        extra=manifest_extra(recipe.serving),
    )


def _version(provenance: Provenance, device: str) -> str:
    return hashlib.sha256(canonical_bytes([to_json(provenance), device])).hexdigest()[:12]


def _variant(candidate: Candidate, plan: Plan, made: Made, place: str) -> Variant:
    artifact = plan.artifact(candidate.artifact)
    return Variant(
        id=candidate.id,
        runtime=candidate.runtime,
        precision=artifact.precision,
        file=place,
        inputs=made.description.inputs,
        outputs=made.description.outputs,
        golden=f"golden/outputs/{artifact.id}",
        min_sqnr_db=MIN_SQNR_DB[artifact.precision],
        threads=candidate.threads,
        accelerator=candidate.accelerator,
        notes=made.description.notes,
        extra=made.description.extra,
    )


def files_of(stage: Path) -> list[str]:
    """Every file of the folder but the manifest, relative to it."""
    return [
        path.relative_to(stage).as_posix()
        for path in stage.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    ]


def with_quality(variants: tuple[Variant, ...], plan: Plan, validation: Validation) -> tuple[Variant, ...]:
    """The variants with the figures that their artifacts were found to have."""
    artifacts = {candidate.id: candidate.artifact for candidate in plan.candidates}
    return tuple(replace(variant, quality=validation.quality(artifacts[variant.id])) for variant in variants)


def pack(
    target: Path, stage: Path, manifest: Manifest, report: BuildReport, request: BuildRequest
) -> BuildReport:
    """Pack the shipped variants with the report's repeatable part and provenance, and say what was packed."""
    (stage / "report.json").write_bytes(to_bytes(repeatable(report)))
    wanted = {variant.file for variant in manifest.variants} | {"report.json"}
    golden = (GOLDEN_INPUTS, *(variant.golden for variant in manifest.variants))
    for path in files_of(stage):
        if path in (manifest.labels, manifest.preprocess.get("vocabulary")) or path.startswith(
            tuple(f"{folder}/" for folder in golden)
        ):
            wanted.add(path)
    entries = file_entries(stage, wanted)
    content = sum(entry.size_bytes for entry in entries)
    # the package itself while it arrives, and the slot that it is unpacked into
    compatible = replace(manifest.compatible, disk_bytes=2 * (content + MAX_PROVENANCE_BYTES))
    packed = replace(manifest, files=entries, compatible=compatible)
    (stage / PROVENANCE_PATH).write_bytes(envelope(packed, request.recipe, request.builder))
    packed = replace(packed, files=file_entries(stage, {*wanted, PROVENANCE_PATH}))
    digest = write_package(stage, packed, target)
    return replace(report, package=target.name, package_sha256=digest, package_bytes=target.stat().st_size)
