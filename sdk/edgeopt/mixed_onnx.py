# SPDX-License-Identifier: Apache-2.0
"""Mixed precision in ONNX: int8, float32, and for matrix products with constant weights blocks of 4 bits (MatMulNBits).

Why not int16 activations or float16? ONNX Runtime's CPU kernels have no 16-bit integers (it computes such a file in
floats), and convert float16 to float32 and back around every operator.

The ranges are those of the int8 artifact; a tensor that gets integers only because its neighbour left them is observed
then, alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeopt.artifacts import TENSOR_SAMPLES, Adapted, Made
from edgeopt.onnx_select import PRODUCTS, describe, select
from edgeopt.ranges import Range
from edgeopt.search import Changes, Knob, rank_operators
from edgeopt_converters.model import Model
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    from edgeopt.recipe import Recipe
    from edgeopt_profiles.profile import Scheme

FOUR_BITS = ("MatMul", "Gemm")


@dataclass
class OnnxWorkshop:
    """Everything that making one try needs, set up once."""

    made: Made
    scheme: Scheme
    folded: Any
    samples: Adapted
    recipe: Recipe
    knobs: tuple[Knob, ...]
    ranges: dict[str, Range] = field(default_factory=dict)

    def make(self, changes: Changes) -> bytes:
        """A file with these operators at these levels."""
        from edgeopt.fake_quantize import read_quantized
        from edgeopt.passes.quantize_static import with_ranges

        floats = tuple(change.operator for change in changes if change.level == "fp32")
        small = tuple(change.operator for change in changes if change.level == "int4")
        base = self._in_blocks(small) if small else self.folded
        excluded = tuple(sorted({*select(self.folded, self.recipe.exclude), *floats}))
        trial = with_ranges(base, self.scheme, dict.fromkeys(_tensors(base), Range(-1.0, 1.0)), excluded)
        missing = frozenset(read_quantized(trial).grids) - self.ranges.keys()
        if missing:
            self.ranges |= self._observed(missing)
        freed = {output.name: Range(-1.0, 1.0) for output in base.graph.output}  # products that write floats
        quantized = with_ranges(base, self.scheme, freed | self.ranges, excluded)
        program: bytes = quantized.SerializeToString(deterministic=True)
        return program

    def describe(self, name: str) -> str:
        """The selector of an operator that survives an export."""
        return describe(self.folded, name)

    def program(self, file: bytes) -> Any:
        """A file as an ONNX model."""
        import onnx

        return onnx.load_from_string(file)

    def _in_blocks(self, names: tuple[str, ...]) -> Any:
        from edgeopt.passes import Order, quantize_weights

        others = tuple(node.name for node in self.folded.graph.node if node.name not in names)
        options = quantize_weights.Options(bits=4, store_rest=False)
        order = Order(samples=self.samples, exclude=others, options=options)
        of = self.made.description
        model = Model("onnx", self.folded, of.name, of.inputs, of.outputs)
        return quantize_weights.apply(model, order).model.program

    def _observed(self, missing: frozenset[str]) -> Mapping[str, Range]:
        from edgeopt.calibrate import Stream, find_ranges
        from edgeopt.onnx_graphs import observer

        return find_ranges(
            observer(self.folded, missing),
            Stream(self.samples),
            self.recipe.calibration,
            symmetric=self.scheme.symmetric_activations,
        )


def open_workshop(made: Made, samples: Adapted, recipe: Recipe) -> OnnxWorkshop:
    """Set up for an int8 artifact: ranges read off it, operators ranked by their own error.

    Raises:
        RecipeError: The artifact was not made from a float model.
    """
    import onnx

    from edgeopt.fake_quantize import read_quantized
    from edgeopt.onnx_graphs import fold

    scheme = made.artifact.scheme
    if made.base is None or scheme is None:
        raise RecipeError(f"{made.artifact.id} was not made from a float model; nothing can be searched")
    folded = fold(onnx.load(made.base))
    grids = read_quantized(made.model().program).grids
    ranges = {name: Range(grid.low, grid.high) for name, grid in grids.items()}
    knobs = _knobs(folded, _ranked(made, samples, folded), recipe)
    return OnnxWorkshop(made, scheme, folded, samples, recipe, knobs, ranges)


def _ranked(made: Made, samples: Adapted, folded: Any) -> tuple[str, ...]:
    import onnx

    from edgeopt.attribute import Laboratory, sensitivity

    origin = onnx.load(made.origin or made.base)
    laboratory = Laboratory.open(origin, made.model().program, samples, TENSOR_SAMPLES)
    owners = _owners(folded)
    errors = [(owners.get(entry.node, entry.node), entry.share) for entry in sensitivity(laboratory)]
    return rank_operators([node.name for node in folded.graph.node], errors)


def _knobs(folded: Any, order: tuple[str, ...], recipe: Recipe) -> tuple[Knob, ...]:
    from edgeopt_converters.onnx_graph import operators

    known = {operator.name: operator for operator in operators(folded)}
    found = []
    for name in order:
        operator = known[name]
        has_weights = operator.type in FOUR_BITS and operator.weight_bytes > 0
        below = ("int4",) if has_weights and "int4" in recipe.search.levels else ()
        found.append(Knob(name, ("fp32",), below, operator.macs, operator.weight_bytes // 4))
    return tuple(found)


def _tensors(program: Any) -> list[str]:
    """Every tensor that flows."""
    edges = [edge.name for edge in program.graph.input]
    return [*edges, *(name for node in program.graph.node for name in node.output if name)]


def _owners(program: Any) -> dict[str, str]:
    """An activation that a runtime fuses into its convolution belongs to that: Relu or Clip -> the layer's name."""
    writer = {name: node for node in program.graph.node for name in node.output}
    found = {}
    for node in program.graph.node:
        source = writer.get(node.input[0]) if node.input else None
        if node.op_type in ("Relu", "Clip") and source is not None and source.op_type in PRODUCTS:
            found[node.name] = source.name
    return found
