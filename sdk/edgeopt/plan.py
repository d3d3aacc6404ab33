# SPDX-License-Identifier: Apache-2.0
"""What a build will make: from a profile's targets and a recipe to artifacts (files) and candidates (ways to run them).

Several candidates may share one artifact: the same int8 file with one thread and with four. Deciding is pure and
instant, so that `edgeopt build --dry-run` can show it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from edgeopt.recipe import Recipe
from edgeopt_converters.model import SUFFIXES
from edgeopt_profiles.operators import Operator
from edgeopt_profiles.profile import HOST, DeviceProfile, Scheme, Target
from edgeopt_wire.errors import RecipeError, UnsupportedError

BASELINE = "onnx-fp32"
"""The artifact that every figure is compared with: the unmodified model, in ONNX Runtime."""

PASSES = {
    ("onnx", "int8"): "quantize_static",
    ("litert", "int8"): "quantize_litert",
    ("litert", "int8-dynamic"): "quantize_litert_dynamic",
    ("litert", "int8-weights"): "quantize_litert_dynamic",
    ("executorch", "int8"): "quantize_executorch",
    ("executorch", "int8-dynamic"): "quantize_executorch_dynamic",
    ("onnx", "fp16"): "cast_floats",
    ("onnx", "bf16"): "cast_floats",
    ("onnx", "fp8-e4m3"): "quantize_fp8",
    ("onnx", "int8-dynamic"): "quantize_dynamic",
    ("onnx", "int8-weights"): "quantize_weights",
    ("onnx", "int4-weights"): "quantize_weights",
}
"""Which pass makes which precision from the float model of a format."""

SIMULATED = {
    "bf16": "bfloat16 was rounded in float32, because ONNX Runtime's CPU provider has no bfloat16 arithmetic",
    "fp8-e4m3": "E4M3 was rounded in float32: ONNX Runtime's CPU provider converts fp8 and multiplies in float32",
}
"""Precisions whose quality this host can only simulate, and how it does."""

RUNS_ON = {
    "bf16": "TensorRT from version 9 on, from Ampere on (jetson-orin, jetson-thor); no CPU runtime here has it",
    "fp8-e4m3": "TensorRT on Ada, Hopper and Blackwell (jetson-thor); Jetson Orin is Ampere and has no fp8",
}
"""Where precisions run that few devices have, for who asks in vain."""

RUNTIME_OF = {"onnx": "onnxruntime", "litert": "litert", "executorch": "executorch"}
"""The runtime that a format's files are made for, unless an artifact names another."""

FROM_ONNX = ("executorch",)
"""Formats whose files cannot be quantized any more: their pass takes the ONNX form and lowers it itself."""

OWN_FILES = ("openvino",)
"""Runtimes that take another's format and want other files of it."""

PRODUCTS_SHARE = 0.8
"""From this share of multiply-accumulates in matrix products on, ranges found at run time are worth trying too: on
MiniLM they gave a cosine of 0.992 and more where fixed ranges gave 0.928."""

MIN_SQNR_DB = {
    "int8": 20.0,
    "int8-mixed": 20.0,
    "int8-dynamic": 20.0,
    "int8-weights": 20.0,
    "int4-weights": 15.0,
    "fp8-e4m3": 12.0,
    "fp16": 40.0,
    "bf16": 20.0,
    "fp32": 60.0,
}
"""How well a device must reproduce golden outputs. The same file on another CPU differs in rounding only: int8 files
were bit-identical on x86-64 and ARM, an x86 CPU without VNNI that saturates falls below 20 dB, and a float kernel
with another order of additions stays above 100 dB. Golden outputs of fp8 and bf16 are simulated, and no device with
them was at hand: their limits only tell a right kernel from a wrong one."""


@dataclass(frozen=True)
class Artifact:
    """One model file to make."""

    id: str
    format: str
    precision: str
    scheme: Scheme | None = None
    made_for: str = ""
    """The runtime whose fusion rules decide about it, where that is not the format's own."""

    @property
    def runtime(self) -> str:
        """The runtime that it is made for and validated in."""
        return self.made_for or RUNTIME_OF[self.format]

    @property
    def file(self) -> str:
        """Its path in the package."""
        return f"variants/{self.id}{SUFFIXES[self.format]}"

    @property
    def pass_name(self) -> str:
        """The pass that makes it from the float model, or empty for the float model itself."""
        return PASSES.get((self.format, self.precision), "")


@dataclass(frozen=True)
class Candidate:
    """One way to run an artifact. `reference` candidates are measured for comparison and never shipped."""

    id: str
    artifact: str
    runtime: str
    threads: int
    accelerator: str
    reference: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that a build for one device makes and measures."""

    device: DeviceProfile
    artifacts: tuple[Artifact, ...]
    candidates: tuple[Candidate, ...]

    def artifact(self, artifact_id: str) -> Artifact:
        """Return the artifact called `artifact_id`."""
        return next(artifact for artifact in self.artifacts if artifact.id == artifact_id)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that the model must be lowered to, the baseline's first."""
        return tuple(dict.fromkeys(artifact.format for artifact in self.artifacts))


def make_plan(profile: DeviceProfile, recipe: Recipe) -> Plan:
    """Decide what to build for a device.

    Every int8 or fp16 candidate gets a float reference in the same runtime with as many threads, so that its gain is
    measured against the same thing in the same run. Float files are shipped only where the recipe asks for fp32: they
    are most of a package's bytes.

    Raises:
        RecipeError: The recipe asks for precisions that the profile does not list.
        UnsupportedError: The profile asks for a precision that no pass makes.
    """
    profile = _with_runtimes(profile, recipe)
    known = [*profile.targets, *_floats(profile), *_more(profile)]
    listed = {target.precision for target in profile.targets if not target.by_recipe}
    wanted = set(recipe.precisions) or listed - {"fp32"} or {"fp32"}
    targets = [target for target in known if target.precision in wanted]
    offered = sorted({target.precision for target in known})
    missing = sorted(set(recipe.precisions) - set(offered))
    if missing:
        where = f"; {missing[0]} runs on {RUNS_ON[missing[0]]}" if missing[0] in RUNS_ON else ""
        raise RecipeError(f"{profile.id} takes {', '.join(offered)}, the recipe asks for {missing[0]}{where}")
    artifacts = {BASELINE: Artifact(BASELINE, "onnx", "fp32")}
    candidates: dict[str, Candidate] = {}
    for target in targets:
        artifact = _artifact(profile, target)
        artifacts[artifact.id] = artifact
        for threads in target.threads:
            candidate = Candidate(
                _candidate_id(target, threads), artifact.id, target.runtime, threads, target.accelerator
            )
            candidates[candidate.id] = candidate
    for candidate in _references(tuple(candidates.values()), artifacts):
        candidates.setdefault(candidate.id, candidate)
    return Plan(profile, tuple(artifacts.values()), tuple(candidates.values()))


def suits_dynamic(operators: Iterable[Operator]) -> bool:
    """Whether nearly all of a model's work is in matrix products, as in transformers."""
    macs: dict[bool, int] = {True: 0, False: 0}
    for operator in operators:
        macs[operator.type in ("MatMul", "Gemm")] += operator.macs
    return macs[True] >= PRODUCTS_SHARE * (macs[True] + macs[False]) > 0


def _with_runtimes(profile: DeviceProfile, recipe: Recipe) -> DeviceProfile:
    """The profile with the targets of the runtimes that the recipe names, or with all that are not optional."""
    offered = sorted({target.runtime for target in profile.targets})
    for name in recipe.runtimes:
        if name not in offered:
            hint = f"; if it could run here: pip install 'edgeopt[{name}]'" if profile.id == HOST else ""
            raise RecipeError(f"{profile.id} takes {', '.join(offered)}, the recipe asks for {name}{hint}")
    return replace(
        profile,
        targets=tuple(
            target
            for target in profile.targets
            if (target.runtime in recipe.runtimes if recipe.runtimes else not target.optional)
        ),
    )


_OFFERED = {
    ("onnxruntime", "onnx"): ("int8-dynamic", "int8-weights", "int4-weights"),
    ("litert", "litert"): ("int8-dynamic", "int8-weights"),
    ("executorch", "executorch"): ("int8-dynamic",),
}
"""What a CPU runtime with int8 can run beside what profiles list."""


def _more(profile: DeviceProfile) -> list[Target]:
    """Precisions that no profile lists, because they suit a model and not a device: a recipe or the model asks."""
    listed = {(target.runtime, target.precision) for target in profile.targets}
    return [
        Target(target.runtime, target.format, precision, target.threads, "cpu", "")
        for target in profile.targets
        if (target.precision, target.accelerator) == ("int8", "cpu")
        for precision in _OFFERED.get((target.runtime, target.format), ())
        if (target.runtime, precision) not in listed
    ]


def _floats(profile: DeviceProfile) -> list[Target]:
    """The float model in every runtime of the device's CPU: no profile lists it, a recipe may ask for it."""
    listed = {(target.runtime, target.precision) for target in profile.targets}
    return [
        Target(target.runtime, target.format, "fp32", target.threads, "cpu", "")
        for target in profile.targets
        if target.accelerator == "cpu"
        and target.precision == "int8"
        and (target.runtime, "fp32") not in listed
    ]


def _artifact(profile: DeviceProfile, target: Target) -> Artifact:
    if target.precision == "fp32":
        return _float(target.format, target.runtime)
    if (target.format, target.precision) not in PASSES:
        raise UnsupportedError(f"{profile.id}: no pass makes {target.precision} in {target.format}")
    scheme = profile.schemes[target.scheme] if target.scheme else None
    suffix = f"-{target.scheme}" if target.scheme else ""
    made_for = _made_for(target.runtime)
    name = f"{made_for or target.format}-{target.precision}{suffix}"
    return Artifact(name, target.format, target.precision, scheme, made_for)


def _float(form: str, runtime: str) -> Artifact:
    made_for = _made_for(runtime)
    return Artifact(f"{made_for or form}-fp32", form, "fp32", made_for=made_for)


def _made_for(runtime: str) -> str:
    """Files that the format's own runtime and an accelerator of it (TensorRT) share are one artifact."""
    return runtime if runtime in OWN_FILES else ""


def _candidate_id(target: Target, threads: int) -> str:
    where = "" if target.accelerator == "cpu" else f"-{target.accelerator}"
    return f"{target.runtime}{where}-{target.precision}-{threads}t"


def _references(candidates: tuple[Candidate, ...], artifacts: dict[str, Artifact]) -> list[Candidate]:
    references = [Candidate("onnxruntime-fp32-1t", BASELINE, "onnxruntime", 1, "cpu", reference=True)]
    for candidate in candidates:
        if candidate.accelerator != "cpu":
            continue
        source = artifacts[candidate.artifact]
        if source.precision != "fp32":
            artifact = _float(source.format, candidate.runtime)
            artifacts.setdefault(artifact.id, artifact)
            name = f"{candidate.runtime}-fp32-{candidate.threads}t"
            references.append(
                Candidate(name, artifact.id, candidate.runtime, candidate.threads, "cpu", reference=True)
            )
    return references
