# SPDX-License-Identifier: Apache-2.0
"""Quantize weights only: 4 or 8 bits in groups for matrix products, int8 for all others; activations stay float.

For models whose weights are their size (language models, wide perceptrons, recurrent nets) and whose activations do
not survive int8. What each operator becomes, and why, stands in `edgeopt.weights.lowering`; the methods are the modules
of `edgeopt.weights`.

Rules:
- Weights of Constant nodes and of branches are found too (`edgeopt_converters.onnx_subgraphs`).
- A narrow product would run slower than in float: its weight is only stored in 4 bits, and unpacked at loading.
- AWQ inserts nothing: an input whose maker cannot take the scale is left unscaled, and a note names it.
- What stays in float is named with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_graphs import fold
from edgeopt.passes import Order, Result
from edgeopt.weights import awq, gptq, hqq, lowering, moments, mse, rtn
from edgeopt.weights.choosing import choose
from edgeopt.weights.folding import Folding
from edgeopt.weights.grid import Grouped
from edgeopt.weights.moments import Moments
from edgeopt.weights.options import SAMPLED, Options
from edgeopt.weights.refine import refined
from edgeopt.weights.storing import store
from edgeopt.weights.work import Product, Work
from edgeopt_converters.model import Model
from edgeopt_converters.onnx_subgraphs import specialise

if TYPE_CHECKING:
    import numpy as np

__all__ = ["EXTRA", "FORMATS", "MIB", "Options", "apply", "walks"]

FORMATS = ("onnx",)
EXTRA = "onnx"

MIB = 1 << 20


def apply(model: Model, order: Order) -> Result:
    """Quantize the weights of matrix products, embeddings, recurrent nets and convolutions.

    `order.exclude` names operators or types that stay in float. Samples are needed for `gptq` and `awq` only.

    Raises:
        RecipeError: The method needs calibration samples and there are none.
    """
    options = order.options if isinstance(order.options, Options) else Options()
    program, _ = specialise(fold(model.program))
    before = program.ByteSize()
    work = Work(program, options, order.exclude)
    choose(work)
    _quantize_products(work, order)
    store(work)
    lowering.swap(program, work.lowered)
    work.notes.append(
        f"{before:,} bytes before, {program.ByteSize():,} after ({program.ByteSize() / before:.3f})"
    )
    if work.left:
        work.notes.append(f"in float: {', '.join(dict.fromkeys(work.left))}")
    return Result(replace(model, program=program), tuple(work.notes))


def walks(order: Order, available: int) -> int:
    """How many samples `apply` walks over, for progress; only the first walk is reported."""
    options = order.options if isinstance(order.options, Options) else Options()
    return min(options.samples, available) if options.method in SAMPLED else 0


def _quantize_products(work: Work, order: Order) -> None:
    """Round every product's weight by the method, batch by batch of what has to be remembered."""
    options = work.options
    seen = {name for node in work.program.graph.node for name in node.output}
    seen |= {entry.name for entry in work.program.graph.input}
    folding = Folding(work.program)
    for product in work.products.values():
        product.values = tuple(folding.root(node.input[0], _inputs(work, product)) for node in product.nodes)
    widths = {
        value: _inputs(work, product)
        for product in work.products.values()
        for value in product.values
        if value in seen and options.method in SAMPLED
    }
    float_program = type(work.program)()
    float_program.CopyFrom(work.program)
    activity: dict[str, np.ndarray] = {}  # AWQ needs no more than the diagonal once an input is scaled
    on_sample = order.on_sample
    for names in moments.batches(widths, options.moments_mib * MIB):
        walk = moments.watched(iter(order.samples), options.samples, on_sample)
        found = moments.second_moments(float_program, names, walk, options.positions)
        on_sample = _silent
        if options.method == "awq":
            activity |= _scale_inputs(work, found, folding)
        else:
            _lower_products(work, found, folding)
    _lower_products(work, activity, folding)
    rest = [product for product in work.products.values() if not _is_lowered(work, product)]
    for product in rest:
        _lower_product(work, product, None, folding)
    _say_products(work, rest)


def _silent() -> None:
    """Nothing is reported."""


def _lower_products(work: Work, found: Mapping[str, Any], folding: Folding) -> None:
    """Lower the products whose inputs are in `found`: their moments, or for AWQ how active they are."""
    for product in work.products.values():
        seen = [found[value] for value in product.values if value in found]
        if seen and not _is_lowered(work, product):
            _lower_product(work, product, sum(seen[1:], seen[0]), folding)


def _is_lowered(work: Work, product: Product) -> bool:
    return (product.weight if product.is_narrow else lowering.key(product.nodes[0])) in work.lowered


def _say_products(work: Work, rest: list[Product]) -> None:
    options = work.options
    if not work.products:
        return
    kind = "symmetric" if options.symmetric else "with zero points"
    narrow = sum(product.is_narrow for product in work.products.values())
    work.notes.append(
        f"{len(work.products)} matrix weights in {options.bits} bits, groups of {options.group}, {kind}, by "
        f"{options.method}; ONNX Runtime accuracy level {options.accuracy_level}"
    )
    if narrow:
        work.notes.append(
            f"{narrow} of them of fewer than {options.skip_k_below} inputs: unpacked at loading, they run in float"
        )
    if options.method in SAMPLED and rest:
        names = ", ".join(product.weight for product in rest)
        work.notes.append(f"inside branches, rounded without samples: {names}")


def _scale_inputs(work: Work, found: Mapping[str, Moments], folding: Folding) -> dict[str, np.ndarray]:
    """Scale the inputs whose maker can be divided; return how active each one is afterwards, and note the others."""
    import numpy as np

    unscaled = []
    activity = {}
    for name, seen in found.items():
        scale = _scale_input(work, name, seen, folding)
        if scale is None:
            unscaled.append(name)
        activity[name] = np.diag(seen.squares) / (1.0 if scale is None else scale**2)
    if unscaled:
        work.notes.append(
            f"AWQ could not scale {len(unscaled)} inputs without a new operator: {', '.join(unscaled)}"
        )
    return activity


def _scale_input(work: Work, value: str, seen: Moments, folding: Folding) -> np.ndarray | None:
    """Scale the inputs of all products that read `value`; None where its maker cannot be divided."""
    import numpy as np
    import onnx

    readers = [product for product in work.products.values() if value in product.values]
    read = [node.input[0] for product in readers for node in product.nodes]
    places = folding.places(value, folding.only_for(value, read))
    if not places or any(len(product.nodes) > 1 for product in readers):
        return None
    rows = [_rows(work, product) for product in readers]
    scale = awq.input_scale(rows, work.options.grid, seen.squares)
    folding.divide(places, scale)
    for product, weight in zip(readers, rows, strict=True):
        scaled = (weight * scale).astype(np.float32)
        kept = np.ascontiguousarray(scaled if product.is_rows else scaled.T)
        work.constants[product.weight].CopyFrom(onnx.numpy_helper.from_array(kept, product.weight))
    return scale


def _rows(work: Work, product: Product) -> np.ndarray:
    weight = work.array(product.weight)
    return weight if product.is_rows else weight.T


def _inputs(work: Work, product: Product) -> int:
    return int(work.constants[product.weight].dims[1 if product.is_rows else 0])


def _lower_product(work: Work, product: Product, seen: Any, folding: Folding) -> None:
    """Round one weight by the method; `seen` is None, the moments of its inputs, or for AWQ how active each is.

    Where a bias follows, it takes the mean error, and only what varies about the mean has to be rounded well (Nagel et
    al. 2019, section 4.2; round_weights does it after rounding, here rounding already counts on it).
    """
    weight = _rows(work, product)
    bias = folding.bias(product.nodes[0], len(weight)) if len(product.nodes) == 1 else ""
    if isinstance(seen, Moments):
        about = gptq.damped(seen.centred if bias else seen.squares)
        found = refined(weight, gptq.quantize(weight, work.options.grid, about), about)
        found = lowering.with_stored_scales(found) if product.is_narrow else found
        if bias:
            _shift(work, bias, (weight - found.floats(weight.shape[1])) @ seen.mean)
    else:
        found = _rounded(weight, work.options, seen)
    if product.is_narrow:
        work.lowered[product.weight] = lowering.unpacked(product.weight, found, is_rows=product.is_rows)
        return
    for node in product.nodes:
        work.lowered[node.output[0]] = lowering.product(
            node, found, weight.shape[1], work.options.accuracy_level
        )


def _shift(work: Work, bias: str, shift: np.ndarray) -> None:
    """Add to a constant bias what rounding took from the mean of each output."""
    import numpy as np
    import onnx

    values = work.array(bias)
    moved = np.ascontiguousarray((values + shift).astype(values.dtype))
    work.constants[bias].CopyFrom(onnx.numpy_helper.from_array(moved, bias))


def _rounded(weight: np.ndarray, options: Options, seen: np.ndarray | None) -> Grouped:
    """Round without moments; `seen` weighs the inputs."""
    if options.method == "rtn":
        return rtn.quantize(weight, options.grid)
    if options.method == "hqq":
        return hqq.quantize(weight, options.grid)
    return mse.quantize(weight, options.grid, seen)
