# SPDX-License-Identifier: Apache-2.0
"""Making the model files of a build: lower the source to each format, then run the passes, each stage cached.

A made artifact is its bytes, its own inputs and outputs, and notes; `Made.model()` gives the program back to a pass
only when one needs it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.passes import Order
from edgeopt.plan import Artifact
from edgeopt.progress import Step
from edgeopt.side_by_side import loaded
from edgeopt.sources import Source, file_digest
from edgeopt.training.spans import LearnedRange
from edgeopt.workbench import Workbench
from edgeopt_converters import path as conversion
from edgeopt_converters.model import Model
from edgeopt_wire import __version__, seam
from edgeopt_wire.document import from_bytes, to_bytes, to_json
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.attribute import Attribution
    from edgeopt.evaluate.samples import Samples

TENSOR_SAMPLES = 4
"""How many samples every tensor by itself is tried on: their order hardly changes with more."""

MODEL_FILE = "model"
"""What a stage's folder calls the bytes of its model."""

NOT_IN_ARTIFACTS = ("cli/", "fleet/", "demo/", "report/")
"""Code of this package that no artifact depends on."""

TOOLS = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "litert-torch",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "executorch",
    "openvino",
    "numpy",
)


@dataclass(frozen=True)
class Description:
    """What lies beside the bytes of a made artifact."""

    SCHEMA = "edgeopt.artifact/1"

    format: str
    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    notes: tuple[str, ...] = ()
    ranges: tuple[LearnedRange, ...] = ()
    """Of its activations, where training found them."""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """An artifact on disk: `file` holds the model's bytes."""

    artifact: Artifact
    file: Path
    description: Description
    origin: Path | None = None
    """The float model that a quantized ONNX artifact came from, before its weights were rounded."""
    base: Path | None = None
    """The float model that it was made from by its pass, weights rounded where they are."""
    hub: Path | None = None
    """The float ONNX model that `base` was lowered from, weights rounded where they are."""

    @property
    def size_bytes(self) -> int:
        """Size of the model file."""
        return self.file.stat().st_size

    def model(self) -> Model:
        """Load the program into memory."""
        found = self.description
        program: Any = self.file.read_bytes()
        if found.format == "onnx":
            import onnx

            program = onnx.load_from_string(program)
        return Model(found.format, program, found.name, found.inputs, found.outputs)


def places_of(made: Mapping[str, Made]) -> dict[str, str]:
    """Where each artifact lies in the package: those with the same bytes, for two runtimes, at the first one's place."""
    taken: dict[tuple[str, str], str] = {}
    return {
        name: taken.setdefault((entry.artifact.format, file_digest(entry.file)), entry.artifact.file)
        for name, entry in made.items()
    }


def tool_versions() -> dict[str, str]:
    """The versions of everything whose version changes what comes out."""
    found = {"edgeopt": __version__}
    for tool in TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def code_digest() -> str:
    """SHA-256 of the code that makes artifacts, so that a changed pass never meets an old result in the cache."""
    digest = hashlib.sha256()
    for package in ("edgeopt", "edgeopt_converters"):
        folder = Path(str(resources.files(package)))
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder).as_posix()
            if package != "edgeopt" or not name.startswith(NOT_IN_ARTIFACTS):
                digest.update(f"{package}/{name}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def attribute_artifact(
    made: Made, samples: Samples, source: Source, bench: Workbench, *, tensors: bool = False
) -> Attribution:
    """Say where the error of a statically quantized ONNX artifact comes from.

    With `tensors` every tensor by itself too, on `TENSOR_SAMPLES` samples.
    """
    import onnx

    from edgeopt.attribute import Attribution, Laboratory, attribute, steps

    origin = made.origin or made.file
    key = {
        "stage": "attribute",
        "artifact": file_digest(made.file),
        "origin": file_digest(origin),
        "runtime": made.artifact.runtime,
        "samples": samples.digest,
        "tensors": tensors,
    }
    adapted = Adapted(samples, source.model.inputs, made.description.inputs)
    laboratory: Laboratory | None = None
    if tensors:
        laboratory = Laboratory.open(onnx.load(origin), made.model().program, adapted, TENSOR_SAMPLES)

    def make(folder: Path, step: Step) -> None:
        opened = laboratory or Laboratory.open(onnx.load(origin), made.model().program, adapted)
        found = attribute(opened, _runtime_outputs(made, opened.samples), step.advance, tensors=tensors)
        (folder / "attribution.json").write_bytes(to_bytes(found))

    folder = bench.stage(
        f"attribute the error of {made.artifact.id}",
        key,
        make,
        total=steps(laboratory) if laboratory else None,
    )
    return from_bytes(Attribution, (folder / "attribution.json").read_bytes())


def _runtime_outputs(made: Made, samples: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """What the artifact's runtime itself says: (samples, values)."""
    import numpy as np

    edges = (made.description.inputs, made.description.outputs)
    with loaded(made.file.read_bytes(), made.artifact.runtime, *edges) as session:
        found = [session.run(sample) for sample in samples]
    return np.stack(
        [
            np.concatenate([np.asarray(row[spec.name], np.float64).reshape(-1) for spec in edges[1]])
            for row in found
        ]
    )


def lower(target: str, model: Model, digest: str, bench: Workbench, of: str = "") -> Made:
    """Convert a model to the format `target`, as a cached stage; `digest` stands for its content.

    Raises:
        UnsupportedError: An operator of the model does not exist in that format.
    """
    key = {
        "stage": "lower",
        "source": digest,
        "from": model.format,
        "to": target,
        "name": model.name,
        "inputs": to_json(model.inputs),
    }
    artifact = Artifact(f"{target}-fp32", target, "fp32")
    folder = bench.stage(
        f"lower {of}to {target}",
        key,
        lambda entry, _: write_artifact(entry, conversion.convert(model, target), ()),
        describe=lambda entry: f"{(entry / MODEL_FILE).stat().st_size / 1e6:.2f} MB",
    )
    return read_artifact(folder, artifact)


def optimize(
    artifact: Artifact,
    base: Made,
    order: Order,
    samples: Samples | None,
    bench: Workbench,
    *,
    by: str = "",
) -> Made:
    """Run a pass over `base`, as a cached stage that knows everything its result depends on."""
    by = by or artifact.pass_name
    module = seam.load("edgeopt.passes", by)
    is_calibrated = bool(order.samples)
    key = {
        "stage": by,
        "base": file_digest(base.file),
        "scheme": to_json(order.scheme),
        "calibration": to_json(order.calibration) if is_calibrated else None,
        "samples": samples.digest if is_calibrated and samples else None,
        "exclude": list(order.exclude),
        "options": to_json(order.options),
        "ranges": to_json(order.ranges),
    }

    def make(folder: Path, step: Step) -> None:
        working = replace(order, on_sample=step.advance, checkpoint=bench.partial(key))
        result = module.apply(base.model(), working)
        write_artifact(folder, result.model, result.notes, result.ranges)

    def describe(folder: Path) -> str:
        return f"{base.size_bytes / 1e6:.2f} -> {(folder / MODEL_FILE).stat().st_size / 1e6:.2f} MB"

    total = module.walks(order, len(samples)) if is_calibrated and samples else None
    folder = bench.stage(f"{by} {artifact.id}", key, make, total=total, describe=describe)
    made = replace(read_artifact(folder, artifact), origin=base.origin, base=base.file, hub=base.hub)
    notes = (*base.description.notes, *made.description.notes)
    return replace(made, description=replace(made.description, notes=notes))


@dataclass(frozen=True)
class Adapted:
    """Samples in the layout and types of an artifact's own inputs; can be walked again and again."""

    samples: Samples
    signature: tuple[TensorSpec, ...]
    inputs: tuple[TensorSpec, ...]

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        from edgeopt_agent.tensors import to_variant

        for sample in self.samples:
            yield to_variant(self.signature, self.inputs, sample.inputs)


def write_artifact(
    folder: Path, model: Model, notes: tuple[str, ...], ranges: tuple[LearnedRange, ...] = ()
) -> None:
    """Write a model and what lies beside it into the folder of a stage."""
    program = (
        model.program
        if isinstance(model.program, bytes)
        else model.program.SerializeToString(deterministic=True)
    )
    (folder / MODEL_FILE).write_bytes(program)
    description = Description(model.format, model.name, model.inputs, model.outputs, notes, ranges)
    (folder / "description.json").write_bytes(to_bytes(description))


def read_artifact(folder: Path, artifact: Artifact) -> Made:
    """Read what `write_artifact` wrote."""
    description = from_bytes(Description, (folder / "description.json").read_bytes())
    return Made(artifact, folder / MODEL_FILE, description)
