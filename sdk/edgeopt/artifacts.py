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
from edgeopt.passes.round_weights import Options as RoundOptions
from edgeopt.plan import Artifact, Plan
from edgeopt.progress import Step
from edgeopt.recipe import Recipe
from edgeopt.sources import Source, file_digest
from edgeopt.workbench import Workbench
from edgeopt_converters import path as conversion
from edgeopt_converters.model import Model
from edgeopt_wire import __version__, seam
from edgeopt_wire.document import from_bytes, to_bytes, to_json
from edgeopt_wire.errors import RecipeError, UnsupportedError
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


def check_extras(plan: Plan, source: Source) -> None:
    """Refuse at once what would fail after minutes: a format whose libraries are not installed.

    Raises:
        UnsupportedError: An extra is missing; the message says which to install.
    """
    needed = {
        "onnx": ("onnx", "onnxruntime"),
        "litert": ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"),
    }
    for name in plan.formats:
        missing = [module for module in needed[name] if importlib.util.find_spec(module) is None]
        if missing:
            why = " (a LiteRT model is made by way of PyTorch)" if name == "litert" else ""
            raise UnsupportedError(
                f"{plan.device.id} takes {name} models{why} and {', '.join(missing)} is not installed: "
                f"pip install 'edgeopt[{name}]'"
            )
    if source.model.format == "torch" and importlib.util.find_spec("onnxscript") is None:
        raise UnsupportedError("a PyTorch model needs onnxscript: pip install 'edgeopt[torch]'")


def make_artifacts(
    plan: Plan, source: Source, samples: Samples | None, recipe: Recipe, bench: Workbench
) -> dict[str, Made]:
    """Make every artifact of the plan: id -> made.

    Raises:
        RecipeError: An int8 artifact is planned and there are no calibration samples.
        UnsupportedError: An operator of the model does not exist in a format.
    """
    for artifact in plan.artifacts:
        if artifact.precision == "int8" and samples is None:
            raise RecipeError(
                f"{artifact.id} needs calibration data: give --calibration DATA (a folder of images, an .npz file or "
                "module:factory), or ask for other precisions in the recipe"
            )
    floats = {name: _lower(name, source.model, source.sha256, bench) for name in plan.formats}
    bases = _rounded(plan, source, floats, samples=samples, recipe=recipe, bench=bench)
    made: dict[str, Made] = {}
    for artifact in plan.artifacts:
        base = bases[artifact.format] if artifact.precision == "int8" else floats[artifact.format]
        if artifact.pass_name:
            order = _order(artifact, base, source, samples, recipe)
            made[artifact.id] = _optimize(artifact, base, order, samples, bench)
        else:
            made[artifact.id] = Made(artifact, base.file, base.description)
    return made


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
    """What ONNX Runtime itself says: (samples, values)."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(made.file), options, providers=["CPUExecutionProvider"])
    return np.stack(
        [
            np.concatenate(
                [np.asarray(found, np.float64).reshape(-1) for found in session.run(None, dict(sample))]
            )
            for sample in samples
        ]
    )


def _rounded(
    plan: Plan,
    source: Source,
    floats: Mapping[str, Made],
    *,
    samples: Samples | None,
    recipe: Recipe,
    bench: Workbench,
) -> dict[str, Made]:
    """The float models that int8 artifacts start from: weights on the int8 grid, decided once for every format.

    The rounded ONNX model enters the other formats through the hub. Where an operator of it cannot, that format keeps
    weights rounded to nearest, and a note says so.
    """
    has_int8 = any(artifact.precision == "int8" for artifact in plan.artifacts)
    if not has_int8 or samples is None:
        return dict(floats)
    rounded = floats.get("onnx") or _lower("onnx", source.model, source.sha256, bench)
    rounded = replace(rounded, origin=rounded.file)
    adapted = Adapted(samples, source.model.inputs, rounded.description.inputs)
    safe: Made | None = None
    for name in _preparation(plan, rounded, adapted, recipe=recipe, bench=bench):
        artifact = Artifact(f"onnx-{name}", "onnx", "fp32")
        order = Order(samples=adapted, exclude=recipe.exclude, options=recipe.options(name))
        before = rounded
        if name != "round_weights":
            rounded = _optimize(artifact, before, order, samples, bench, by=name)
            rounded = replace(rounded, origin=rounded.file)
            continue
        if _wants_pair_safe(plan):
            careful = replace(order, options=replace(RoundOptions.of(order.options), pair_safe=True))
            safe = _optimize(artifact, before, careful, samples, bench, by=name)
        if safe is None or plan.formats != ("onnx",):
            rounded = _optimize(artifact, before, order, samples, bench, by=name)
    if rounded.artifact.id == "onnx-fp32" and safe is None:
        return {**floats, "onnx": rounded}
    found = dict(floats)
    found["onnx"] = safe or rounded
    for name in plan.formats:
        if name != "onnx":
            try:
                found[name] = _lower(name, rounded.model(), file_digest(rounded.file), bench, of="rounded ")
            except UnsupportedError as error:
                note = f"weights rounded to nearest, because the rounded model cannot be lowered to {name}: {error}"
                described = replace(floats[name].description, notes=(*floats[name].description.notes, note))
                found[name] = replace(floats[name], description=described)
    return found


def _wants_pair_safe(plan: Plan) -> bool:
    """Whether some ONNX artifact must run without overflow on every x86; other formats keep their plain grid."""
    return any(
        artifact.format == "onnx" and artifact.scheme is not None and artifact.scheme.pair_safe
        for artifact in plan.artifacts
    )


def _preparation(
    plan: Plan, base: Made, samples: Adapted, *, recipe: Recipe, bench: Workbench
) -> tuple[str, ...]:
    """The passes over the float model before it is quantized, by effort and by what its weights cost."""
    per_channel = all(artifact.scheme is None or artifact.scheme.per_channel for artifact in plan.artifacts)
    chosen = ("equalize_activations",) if recipe.effort == "extensive" else ()
    if recipe.effort == "quick" or recipe.rounding == "nearest" or not per_channel:
        return chosen
    from edgeopt.attribute import ENOUGH_DB, weights_alone_db

    with bench.progress.stage("weigh the weights' own error") as step:
        alone = weights_alone_db(base.model().program, samples)
        step.detail = f"{alone:.1f} dB by nearest rounding"
    return chosen if alone >= ENOUGH_DB else (*chosen, "round_weights")


def _lower(target: str, model: Model, digest: str, bench: Workbench, of: str = "") -> Made:
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
    return _read(folder, artifact)


def _order(artifact: Artifact, base: Made, source: Source, samples: Samples | None, recipe: Recipe) -> Order:
    if artifact.precision != "int8" or samples is None:
        return Order(exclude=recipe.exclude, options=recipe.options(artifact.pass_name))
    return Order(
        scheme=artifact.scheme,
        calibration=recipe.thorough_calibration,
        samples=Adapted(samples, source.model.inputs, base.description.inputs),
        exclude=recipe.exclude,
        options=recipe.options(artifact.pass_name),
    )


def _optimize(
    artifact: Artifact,
    base: Made,
    order: Order,
    samples: Samples | None,
    bench: Workbench,
    *,
    by: str = "",
) -> Made:
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
    }

    def make(folder: Path, step: Step) -> None:
        working = replace(order, on_sample=step.advance, checkpoint=bench.partial(key))
        result = module.apply(base.model(), working)
        write_artifact(folder, result.model, result.notes)

    def describe(folder: Path) -> str:
        return f"{base.size_bytes / 1e6:.2f} -> {(folder / MODEL_FILE).stat().st_size / 1e6:.2f} MB"

    total = module.walks(order, len(samples)) if is_calibrated and samples else None
    folder = bench.stage(f"{by} {artifact.id}", key, make, total=total, describe=describe)
    made = replace(_read(folder, artifact), origin=base.origin, base=base.file)
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


def write_artifact(folder: Path, model: Model, notes: tuple[str, ...]) -> None:
    """Write a model and what lies beside it into the folder of a stage."""
    program = (
        model.program
        if isinstance(model.program, bytes)
        else model.program.SerializeToString(deterministic=True)
    )
    (folder / MODEL_FILE).write_bytes(program)
    description = Description(model.format, model.name, model.inputs, model.outputs, notes)
    (folder / "description.json").write_bytes(to_bytes(description))


def _read(folder: Path, artifact: Artifact) -> Made:
    description = from_bytes(Description, (folder / "description.json").read_bytes())
    return Made(artifact, folder / MODEL_FILE, description)
