# SPDX-License-Identifier: Apache-2.0
"""How a package is served, from a recipe: checked keys, ONNX files whose batch axis is free, a vocabulary that goes along.

Rules:
- The keys are the device's own (`edgeopt_wire.serving`, `edgeopt_agent.answers`); what a device would refuse is refused here.
- With `max_batch` above 1 every ONNX file gets a free batch axis before anything is compared or measured, so that
  quality and latency in the report are those of the file that ships.
- The proof is the device's own as well: golden samples together and alone, in the runtime itself. A variant that cannot
  be served in batches ends the build with its name.

Why free the axis only now? Every pass before works on static shapes, and folds what depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.recipe import Recipe
from edgeopt_agent.model import open_model
from edgeopt_converters.model import Model
from edgeopt_wire.document import from_json, to_json
from edgeopt_wire.errors import DocumentError, EdgeoptError, RecipeError, UnsupportedError
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.seam import unknown
from edgeopt_wire.serving import Serving

if TYPE_CHECKING:
    from edgeopt.evaluate.preprocess import Preprocess
    from edgeopt.evaluate.texts import TextPreprocess

AXIS = "batch"


def read_serving(keys: Mapping[str, Any]) -> Serving | None:
    """The checked `[serving]` of a recipe, None where there is none.

    Raises:
        RecipeError: An unknown key, or a value out of its bounds.
    """
    if not keys:
        return None
    try:
        found = from_json(Serving, keys, "[serving]")
    except DocumentError as error:
        raise RecipeError(str(error)) from error
    if found.extra:
        known = [name for name in Serving.__dataclass_fields__ if name != "extra"]
        raise RecipeError(f"[serving]: {unknown('key', next(iter(found.extra)), known)}")
    return found


def manifest_extra(keys: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of serving: the recipe's keys as they stand, nothing where there are none."""
    serving = read_serving(keys)
    return {"serving": {key: to_json(value) for key, value in keys.items()}} if serving else {}


def lay_out(source: Path, target: Path, keys: Mapping[str, Any]) -> None:
    """Copy a model file to its place in the package; an ONNX file that is served in batches gets a free batch axis."""
    import shutil

    serving = read_serving(keys)
    if serving is None or serving.max_batch == 1 or target.suffix != ".onnx":
        shutil.copyfile(source, target)
        return
    import onnx

    program = onnx.load(source)
    free_batch_axis(program)
    onnx.save(program, target)


def lay_out_preprocess(
    stage: Path, preprocess: Preprocess | TextPreprocess | None, said: Mapping[str, Any]
) -> dict[str, Any]:
    """`preprocess` of the manifest: what was `said` of photos as it stands, of texts with the vocabulary in the package."""
    from edgeopt.evaluate.texts import FILE, TextPreprocess

    if not isinstance(preprocess, TextPreprocess):
        return dict(said)
    (stage / FILE).write_text("\n".join(preprocess.tokens) + "\n", encoding="utf-8")
    return preprocess.as_mapping()


def free_batch_axis(program: Any) -> None:
    """Make axis 0 of every input and output free, in place.

    Constant shapes of Reshape that begin with the batch of 1 follow it: the 1 becomes -1, and a -1 elsewhere the size that
    it stands for. Shapes that inference wrote down are forgotten.
    """
    import numpy as np
    from onnx import numpy_helper

    graph = program.graph
    known = _static_shapes(program)
    constants = {entry.name: entry for entry in graph.initializer}
    replaced: set[str] = set()
    for number, node in enumerate(graph.node):
        if node.op_type != "Reshape" or node.input[0] in constants or node.input[1] not in constants:
            continue
        said = numpy_helper.to_array(constants[node.input[1]])
        shape = known.get(node.output[0], tuple(said.tolist()))
        if shape[:1] != (1,) or -1 in shape:
            continue
        name = f"{node.input[1]}_{AXIS}_{number}"
        follows = np.asarray((-1, *shape[1:]), np.int64)
        graph.initializer.append(numpy_helper.from_array(follows, name))
        replaced.add(node.input[1])
        node.input[1] = name
    used = {name for node in graph.node for name in node.input} | {edge.name for edge in graph.output}
    has_branches = any(attribute.HasField("g") for node in graph.node for attribute in node.attribute)
    if not has_branches:  # a branch may use what no node out here does
        for name in replaced - used:
            graph.initializer.remove(constants[name])
    for edge in (*graph.input, *graph.output):
        axes = edge.type.tensor_type.shape.dim
        if axes and axes[0].dim_value == 1:
            axes[0].dim_param = AXIS
    del graph.value_info[:]


def _static_shapes(program: Any) -> dict[str, tuple[int, ...]]:
    from onnx import shape_inference

    inferred = shape_inference.infer_shapes(program).graph
    found = {}
    for edge in (*inferred.value_info, *inferred.output):
        axes = edge.type.tensor_type.shape.dim
        if all(axis.HasField("dim_value") for axis in axes):
            found[edge.name] = tuple(axis.dim_value for axis in axes)
    return found


def prove_served(stage: Path, manifest: Manifest) -> None:
    """Prove on this host what every device proves before it serves the package in batches.

    Raises:
        RecipeError: A variant does not run in batches, or answers otherwise than alone; the message names it.
    """
    from edgeopt_agent.serve.execution import Edges
    from edgeopt_agent.serve.readiness import prove_batch

    serving = read_serving(manifest.extra.get("serving", {}))
    if serving is None or serving.max_batch == 1:
        return
    for variant in manifest.variants:
        if variant.accelerator != "cpu":
            continue
        try:
            with open_model(stage, manifest, variant.id) as loaded:
                prove_batch(loaded, Edges(manifest, variant, serving), stage, serving.max_batch)
        except UnsupportedError as error:
            raise RecipeError(f"{error}; or leave this runtime or precision out of the recipe") from error


def check_served(recipe: Recipe, model: Model) -> None:
    """Refuse before anything is built what a device would refuse: the recipe's keys, tried on tensors of the model's shapes.

    Raises:
        RecipeError: An unknown kind or key, a value out of its bounds, or an output that the model does not have.
    """
    read_serving(recipe.serving)
    if not recipe.postprocess:
        return
    import numpy as np

    from edgeopt_agent.answers import finish

    inputs, outputs = (
        {spec.name: np.ones(spec.shape, spec.dtype) for spec in specs}
        for specs in (model.inputs, model.outputs)
    )
    try:
        finish(str(recipe.postprocess.get("kind", "classify")), recipe.postprocess, outputs, inputs)
    except EdgeoptError as error:
        raise RecipeError(f"[postprocess]: {error}") from error
