# SPDX-License-Identifier: Apache-2.0
"""Does each artifact still say what the model says? Outputs on the evaluation data, golden samples for the devices.

Rules:
- Every artifact runs on this host's CPU in the runtime that it is made for (by default its format's), whatever
  accelerator; what that makes of it, a device finds out with the golden outputs.
- A float artifact that does not reproduce the baseline is a fault of lowering, and ends the build.
- Without evaluation data the calibration samples are used, and the report says that this flatters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.plan import BASELINE, MIN_SQNR_DB, SIMULATED, Artifact, Plan
from edgeopt.progress import Step
from edgeopt.workbench import Workbench
from edgeopt_wire.document import to_json
from edgeopt_wire.errors import RuntimeFailure
from edgeopt_wire.manifest import Manifest, Quality, Variant
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.assess import Assessment
    from edgeopt.evaluate.assess import Evaluation as Asked
    from edgeopt.evaluate.outputs import Outputs
    from edgeopt.evaluate.samples import Samples


GOLDEN_SAMPLES = 2
"""Enough to notice a wrong kernel; each costs a device's disk one input in half precision."""

OUTPUTS_FILE, GOLDEN_FOLDER = "outputs.npz", "golden"

WITHOUT_EVALUATION = "no evaluation data: quality was measured on the calibration samples, which flatters"
WITHOUT_DATA = "no data: quality was measured on random inputs, which says little about real ones"
NOT_MEASURED = "quality was not measured: there was no data; give --evaluation DATA"


@dataclass(frozen=True)
class Validation:
    """What is known of every artifact's outputs, and what a reader must know about how that was found."""

    assessments: Mapping[str, Assessment]
    warnings: tuple[str, ...]
    outputs: Mapping[str, Outputs] = field(default_factory=dict)

    def quality(self, artifact_id: str) -> Quality | None:
        """The figures that a manifest keeps, or None where the artifact was not run."""
        found = self.assessments.get(artifact_id)
        return found.quality if found else None


def not_measured(validation: Validation) -> Validation:
    """Take back every figure of quality that was taken on made-up inputs.

    Raises:
        RuntimeFailure: An artifact gives NaN or infinity even there.
    """
    from edgeopt.evaluate.metrics import SQNR_CEILING_DB

    for name, found in validation.assessments.items():
        if found.quality.sqnr_db is not None and found.quality.sqnr_db <= -SQNR_CEILING_DB:
            raise RuntimeFailure(f"{name} gives NaN or infinity where the unmodified model gives numbers")
    flattering = (WITHOUT_EVALUATION, WITHOUT_DATA)
    others = tuple(text for text in validation.warnings if text not in flattering)
    return Validation({}, (NOT_MEASURED, *others))


@dataclass(frozen=True)
class Question:
    """What is asked of the outputs: the task, and the drop that is allowed (of the baseline's figure if `relative`)."""

    evaluation: Asked
    max_drop: float | None = None
    relative: bool = False


def validate(
    stage: Path,
    manifest: Manifest,
    plan: Plan,
    *,
    samples: Samples | None,
    fallback: Samples | None,
    question: Question,
    bench: Workbench,
) -> Validation:
    """Write golden samples into `stage`, run every artifact over the data, compare with the baseline.

    Raises:
        RuntimeFailure: A float artifact does not reproduce the baseline, or a runtime fails.
    """
    from edgeopt.evaluate.assess import Evaluation, assess, refer
    from edgeopt.evaluate.outputs import Outputs
    from edgeopt.evaluate.samples import random_samples

    warnings: list[str] = []
    is_blind = samples is None
    if samples is None:
        samples = fallback or random_samples(manifest.signature_inputs, 16, seed=0)
        warnings.append(WITHOUT_EVALUATION if fallback else WITHOUT_DATA)
    warnings.extend(
        f"{artifact.id}: {SIMULATED[artifact.precision]}; the device tells what it really gives"
        for artifact in plan.artifacts
        if artifact.precision in SIMULATED
    )
    golden = _golden_inputs(samples, manifest.signature_inputs)
    _write_stack(stage / manifest.golden_inputs, manifest.signature_inputs, golden, half=True)
    found: dict[str, Outputs] = {}
    for artifact in plan.artifacts:
        plain = _plain(manifest, plan, artifact)
        folder = _run(stage, plain, samples, golden, bench)
        _copy_golden(folder / GOLDEN_FOLDER, stage / plain.variants[0].golden)
        found[artifact.id] = Outputs.load(folder / OUTPUTS_FILE)
    evaluation = question.evaluation
    if is_blind and evaluation.task:
        warnings.append(f"no evaluation data: the task {evaluation.task!r} was not scored")
        evaluation = Evaluation()
    reference = refer(found[BASELINE], evaluation)
    assessments = {
        artifact.id: assess(
            reference,
            found[artifact.id],
            specs=_plain(manifest, plan, artifact).variants[0].outputs,
            max_drop=question.max_drop,
            relative=question.relative,
        )
        for artifact in plan.artifacts
    }
    for artifact in plan.artifacts:
        _check_lowering(artifact, assessments[artifact.id].quality)
    return Validation(assessments, tuple(warnings), found)


def check_task(
    stage: Path, manifest: Manifest, plan: Plan, *, samples: Samples, evaluation: Asked, bench: Workbench
) -> None:
    """Run and score the baseline alone, so that labels which no task can score end a build before it quantizes.

    Its outputs are kept: `validate` finds them.

    Raises:
        RecipeError: Outputs or labels do not fit the task, or the task has no such figure.
        RuntimeFailure: ONNX Runtime does not run the model.
    """
    from edgeopt.evaluate.assess import refer
    from edgeopt.evaluate.outputs import Outputs

    golden = _golden_inputs(samples, manifest.signature_inputs)
    folder = _run(stage, _plain(manifest, plan, plan.artifact(BASELINE)), samples, golden, bench)
    refer(Outputs.load(folder / OUTPUTS_FILE), evaluation)


def _run(
    stage: Path, plain: Manifest, samples: Samples, golden: list[dict[str, np.ndarray]], bench: Workbench
) -> Path:
    """Run the one variant of `plain` over the samples and the golden inputs; return the folder of both outputs."""
    from edgeopt.evaluate.outputs import collect
    from edgeopt_agent.model import open_model

    variant = plain.variants[0]
    key = {
        "stage": "outputs",
        "artifact": plain.file(variant.file).sha256,
        "runtime": variant.runtime,
        "simulated": variant.precision in SIMULATED,
        "inputs": to_json(variant.inputs),
        "signature": to_json(plain.signature_inputs),
        "samples": samples.digest,
    }

    def make(folder: Path, step: Step) -> None:
        root = _stand_in(stage, variant, bench) if variant.precision == "bf16" else stage
        with open_model(root, plain, variant.id) as model:
            collect(model.infer, samples, step.advance).save(folder / OUTPUTS_FILE)
            outputs = [dict(model.infer(inputs)) for inputs in golden]
        _write_stack(folder / GOLDEN_FOLDER, plain.signature_outputs, outputs, half=False)

    return bench.stage(f"validate {Path(variant.golden).name}", key, make, total=len(samples))


def _stand_in(stage: Path, variant: Variant, bench: Workbench) -> Path:
    """A folder with the float32 twin of a variant's file in its place, which rounds as the file does."""
    import onnx

    from edgeopt.bfloat16 import rounded

    target = bench.scratch / "simulated" / variant.file
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(rounded(onnx.load(stage / variant.file)), target)
    return bench.scratch / "simulated"


def _copy_golden(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def _plain(manifest: Manifest, plan: Plan, artifact: Artifact) -> Manifest:
    """The manifest with one variant: the artifact on this host's CPU, one thread."""
    candidate = next(entry for entry in plan.candidates if entry.artifact == artifact.id)
    variant = manifest.variant(candidate.id)
    here = replace(
        variant,
        runtime=artifact.runtime,
        accelerator="cpu",
        threads=1,
        options={},
        minimum_runtime="",
    )
    return replace(manifest, variants=(here,))


def _golden_inputs(samples: Samples, signature: tuple[TensorSpec, ...]) -> list[dict[str, np.ndarray]]:
    """The first samples, rounded to what is stored, so that a device computes from the very same numbers."""
    import numpy as np

    found: list[dict[str, np.ndarray]] = []
    for sample in samples:
        rounded = {}
        for spec in signature:
            array = sample.inputs[spec.name]
            rounded[spec.name] = (
                array.astype(np.float16).astype(spec.dtype) if array.dtype.kind == "f" else array
            )
        found.append(rounded)
        if len(found) == GOLDEN_SAMPLES:
            break
    return found


def _write_stack(
    folder: Path, specs: tuple[TensorSpec, ...], rows: list[dict[str, np.ndarray]], *, half: bool
) -> None:
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for index, spec in enumerate(specs):
        stacked = np.stack([row[spec.name] for row in rows])
        if stacked.dtype.kind == "f":
            stacked = stacked.astype(np.float16 if half else np.float32)
        np.save(folder / f"{index}.npy", stacked, allow_pickle=False)


def _check_lowering(artifact: Artifact, quality: Quality) -> None:
    limit = MIN_SQNR_DB["fp32"]
    if artifact.precision == "fp32" and quality.sqnr_db is not None and quality.sqnr_db < limit:
        raise RuntimeFailure(
            f"lowering to {artifact.format} changed the model: its float outputs differ from the baseline's by "
            f"{quality.sqnr_db:.1f} dB SQNR, at least {limit:.0f} dB are expected. This is a fault of the converter; "
            "build for a device that runs another format, and report the model"
        )
