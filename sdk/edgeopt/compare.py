# SPDX-License-Identifier: Apache-2.0
"""`edgeopt compare`: do two models say the same on the same samples, and how far apart are they where they do not.

A model is a package (with `:variant` for one of its variants, else its first), an .onnx, a .tflite or a .pte file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.evaluate.outputs import Outputs, collect
from edgeopt.evaluate.parity import Parity, compare_models
from edgeopt.package import SUFFIX, opened
from edgeopt_agent import runtimes, tensors
from edgeopt_agent.model import open_model
from edgeopt_wire.archive import safe_path
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

RANDOM_SAMPLES = 16

Infer = Callable[["Mapping[str, np.ndarray]"], "Mapping[str, np.ndarray]"]


@dataclass(frozen=True)
class Opened:
    """A model that is ready to run: by its user's inputs, and with what its own outputs look like."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocess: Mapping[str, object]
    infer: Infer


@contextlib.contextmanager
def open_any(spec: str, threads: int = 1) -> Iterator[Opened]:
    """Open a package's variant or a model file on this machine's CPU.

    Raises:
        RecipeError: It is neither, or is not there.
    """
    path, _, variant = spec.partition(f"{SUFFIX}:")
    if variant or spec.endswith(SUFFIX):
        package = Path(f"{path}{SUFFIX}" if variant else spec)
        with opened(package) as (folder, manifest, _):
            chosen = variant or manifest.variants[0].id
            with open_model(folder, manifest, chosen) as model:
                keys = dict(manifest.preprocess)
                if "vocabulary" in keys:
                    keys["vocabulary"] = str(folder / safe_path(str(keys["vocabulary"])))
                yield Opened(manifest.signature_inputs, model.variant.outputs, keys, model.infer)
        return
    yield from _open_file(Path(spec), threads)


def _open_file(path: Path, threads: int) -> Iterator[Opened]:
    from edgeopt_converters.executorch_file import load_executorch
    from edgeopt_converters.litert_file import load_litert
    from edgeopt_converters.onnx_file import load_onnx

    runtime = {".onnx": "onnxruntime", ".tflite": "litert", ".pte": "executorch"}.get(path.suffix)
    if runtime is None or not path.is_file():
        raise RecipeError(
            f"cannot open {str(path)!r}: expected a package ({SUFFIX}, with :variant for one of several), an .onnx, a "
            f".tflite or a .pte file; looked at {path.absolute()}"
        )
    if runtime == "executorch":
        model = load_executorch(path, name="model")
    else:
        model = (load_onnx if runtime == "onnxruntime" else load_litert)(path, name="model")
    user_inputs = tuple(_as_floats(entry) for entry in model.inputs)
    user_outputs = tuple(_as_floats(entry) for entry in model.outputs)
    variant = Variant(
        id="file", runtime=runtime, precision="fp32", file=path.name, inputs=model.inputs, outputs=model.outputs,
        golden="", min_sqnr_db=0.0, threads=threads,
    )  # fmt: skip
    session = runtimes.find(runtime).load(path, variant)
    try:

        def infer(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            own = tensors.to_variant(user_inputs, model.inputs, inputs)
            return tensors.from_variant(model.outputs, user_outputs, session.run(own))

        yield Opened(user_inputs, model.outputs, {}, infer)
    finally:
        session.close()


def _as_floats(spec: TensorSpec) -> TensorSpec:
    """What a user hands over for a quantized edge: floats."""
    from dataclasses import replace

    return replace(spec, dtype="float32", affine=None) if spec.affine is not None else spec


def compare(first: str, second: str, data: str = "", *, limit: int | None = None) -> Parity:
    """Run both models on the same samples; without data on random ones.

    Raises:
        RecipeError: The two take other inputs, or the data does not fit them.
    """
    from edgeopt.evaluate.preprocess import read_preprocess
    from edgeopt.evaluate.samples import load_samples, random_samples

    with open_any(first) as one, open_any(second) as two:
        preprocess = read_preprocess(one.preprocess or two.preprocess, one.inputs)
        if data:
            samples = load_samples(data, one.inputs, preprocess, limit=limit, seed=1)
        else:
            samples = random_samples(one.inputs, limit or RANDOM_SAMPLES, seed=0)
        convert = _matched(one.inputs, two.inputs)
        outputs: list[Outputs] = [
            collect(one.infer, samples),
            collect(lambda inputs: two.infer(convert(inputs)), samples),
        ]
        return compare_models(outputs[0], outputs[1], one.outputs, two.outputs)


def _matched(
    first: tuple[TensorSpec, ...], second: tuple[TensorSpec, ...]
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Give the first's inputs to the second: by name where the names are the same, else by place; layouts are turned."""
    from dataclasses import replace

    by_name = {spec.name for spec in first} == {spec.name for spec in second}
    order = {spec.name: spec for spec in second}
    pairs = [
        (spec, order[spec.name] if by_name else second[place])
        for place, spec in enumerate(first[: len(second)])
    ]
    if len(first) != len(second):
        raise RecipeError(
            f"the models take {len(first)} and {len(second)} inputs; compare models of one signature"
        )
    wanted = tuple(theirs for _, theirs in pairs)
    renamed = tuple(replace(ours, name=theirs.name) for ours, theirs in pairs)

    def convert(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        named = {theirs.name: inputs[ours.name] for ours, theirs in pairs}
        return tensors.to_variant(renamed, wanted, named)

    return convert
