# SPDX-License-Identifier: Apache-2.0
"""Train a model to be good in integers: weights that lie on the int8 grid, and ranges for its activations.

Fake quantization with learned steps stands where the native quantizers put theirs (LSQ: Esser et al. 2020; LSQ+:
Bhalgat et al. 2020), the float model is the teacher, so samples without labels are enough (Hinton et al. 2015), and
batch normalization is folded while training (Krishnamoorthi 2018, section 3.2.2).

Rules:
- Weights stay floats on the grid scale = max|w| / 127 per output channel, the largest exactly on its end: whatever the
  model is lowered to, its native quantizer finds the same integers. With fewer bits, the end is that of those bits.
- The learned ranges travel beside the model (`Result.ranges`) and find their tensors again by what flows through
  them (`edgeopt.training.spans`).
- A killed run goes on from `order.checkpoint`, and ends with the same bits.
- The result is never worse on held-out samples than what training began with: rounding to nearest and calibrated ranges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from edgeopt.calibrate import Stream, find_ranges
from edgeopt.passes import Order, Result
from edgeopt.training.options import Options
from edgeopt.training.spans import Fingerprint, LearnedRange
from edgeopt_converters.model import Model
from edgeopt_converters.quiet import quiet
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError, RuntimeFailure, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.training.session import Outcome, Tensors
    from edgeopt.training.student import Student

__all__ = ["EXTRA", "FORMATS", "Options", "apply", "walks"]

FORMATS = ("torch",)
EXTRA = "torch"

_OWN_REMARKS = (FutureWarning, DeprecationWarning)
"""PyTorch's, on itself."""

_PAIRS = (
    "trained for steps of max|w| / 127; the scheme is safe for pairs of products, so channels whose pairs could overflow "
    "get a wider step and are rounded to it again"
)


def apply(model: Model, order: Order) -> Result:
    """Train with the order's samples; without a scheme, for weights per channel and asymmetric activations.

    The teacher is `order.reference`, or the model as it is. Both take and give the same tensors in the same order.
    `order.exclude` names nodes of the graph or types of operators (`conv2d`, `Conv`) whose weights and results stay
    float. Progress is one call a sample held, and one a step.

    Raises:
        RecipeError: Fewer than two samples, fewer labels than samples, an exclusion that names nothing, no layer with
            weights, or a program exported in training mode.
        UnsupportedError: The scheme asks for other types than 8-bit integers.
    """
    import torch

    from edgeopt.training.graphs import flat_graph

    options = order.options if isinstance(order.options, Options) else Options()
    with torch.random.fork_rng(devices=[]), quiet(warned=_OWN_REMARKS):
        torch.manual_seed(options.seed)
        samples = _samples(model, order, options)
        student = _student(model, order, options)
        outcome = _train(model, order, student, samples)
        result = _result(model, student, outcome, (flat_graph(model.program), samples[0]))
    if order.scheme is not None and order.scheme.pair_safe:
        return replace(result, notes=(*result.notes, _PAIRS))
    return result


def walks(order: Order, available: int) -> int:
    """How often `apply` tells its progress: once a sample that it holds, once a step."""
    options = order.options if isinstance(order.options, Options) else Options()
    return min(options.samples, available) + options.steps


def _samples(model: Model, order: Order, options: Options) -> list[Tensors]:
    import torch

    found: list[Tensors] = []
    for sample in islice(order.samples, options.samples):
        found.append(tuple(torch.from_numpy(sample[spec.name].copy()) for spec in model.inputs))
        order.on_sample()
    if len(found) < 2:
        raise RecipeError(
            f"quantize_aware_training needs at least 2 samples, found {len(found)}; give --calibration DATA"
        )
    return found


def _student(model: Model, order: Order, options: Options) -> Student:
    from edgeopt.training.graphs import flat_graph
    from edgeopt.training.student import Grids, build_student

    scheme = _checked(order.scheme)
    grids = Grids(options.weight_bits, scheme.per_channel, scheme.symmetric_activations)
    return build_student(flat_graph(model.program), grids, order.exclude)


def _checked(scheme: Scheme | None) -> Scheme:
    if scheme is None:
        return Scheme("uint8", "int8", True, False)
    if scheme.weight_dtype != "int8" or scheme.activation_dtype not in ("uint8", "int8"):
        raise UnsupportedError(
            "quantize_aware_training trains for int8 weights with uint8 or int8 activations; the scheme asks for "
            f"{scheme.weight_dtype}/{scheme.activation_dtype}"
        )
    return scheme


def _train(model: Model, order: Order, student: Student, samples: Sequence[Tensors]) -> Outcome:
    from edgeopt.training.graphs import aten, flat_graph, is_batchable
    from edgeopt.training.session import Desk, Lessons, Session

    options = order.options if isinstance(order.options, Options) else Options()
    teacher = flat_graph((order.reference or model).program).requires_grad_(requires_grad=False)
    outputs = next(node for node in teacher.graph.nodes if node.op == "output").args[0]
    lessons = Lessons(
        samples,
        options.labels,
        tuple(output.target is aten.softmax.int for output in outputs),
        is_batchable(teacher, samples[0], samples[1]),
    )
    desk = Desk(order.checkpoint, _identity(model, order, samples), order.on_sample)
    session = Session(student, teacher, lessons, options, desk)
    if not session.resume():
        _calibrate(student, samples, order)
    return session.run()


def _calibrate(student: Student, samples: Sequence[Tensors], order: Order) -> None:
    """Start every activation grid from the range that calibration chooses."""
    import torch

    student.switch(is_on=False)
    student.graph.eval()
    seen: list[tuple[str, np.ndarray]] = []

    def watch(name: str) -> Any:
        return lambda _grid, inputs, _result: seen.append((name, inputs[0].detach().numpy()))

    hooks = [grid.register_forward_hook(watch(name)) for name, grid in student.grids.items()]

    def observe(sample: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        seen.clear()
        with torch.no_grad():
            student.graph(*(torch.from_numpy(values) for values in sample.values()))
        yield from seen

    flat = [{str(place): tensor.numpy() for place, tensor in enumerate(sample)} for sample in samples]
    symmetric = any(grid.is_symmetric for grid in student.grids.values())
    ranges = find_ranges(observe, Stream(flat), order.calibration, symmetric=symmetric)
    for hook in hooks:
        hook.remove()
    for name, grid in student.grids.items():
        grid.begin(ranges[name].low, ranges[name].high)


def _identity(model: Model, order: Order, samples: Sequence[Tensors]) -> str:
    """Name the run: model, samples and everything that was asked for; a resumed one must match."""
    from edgeopt_converters.torch_program import digest

    found = hashlib.sha256(digest(model.program).encode())
    if order.reference is not None:
        found.update(digest(order.reference.program).encode())
    found.update(f"{order.options} {order.scheme} {order.calibration} {order.exclude}".encode())
    for sample in samples:
        for tensor in sample:
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def _result(model: Model, student: Student, outcome: Outcome, reference: tuple[Any, Tensors]) -> Result:
    from edgeopt.training.graphs import export
    from edgeopt.training.student import export_graph
    from edgeopt_converters.torch_program import program_model

    graph, sample = reference
    graph = export_graph(student, graph)
    program = export(graph, model.program)
    trained = program_model(program, name=model.name, layouts=tuple(spec.layout for spec in model.inputs))
    if [spec.name for spec in trained.inputs] != [spec.name for spec in model.inputs]:
        raise RuntimeFailure(
            f"quantize_aware_training: PyTorch renamed the inputs {[spec.name for spec in model.inputs]} to "
            f"{[spec.name for spec in trained.inputs]} while exporting; export the model with plain tensor inputs"
        )
    note = (
        f"trained for {outcome.steps} steps ({outcome.ending}); held-out loss "
        f"{outcome.first_loss:.4g} before, {outcome.best_loss:.4g} after step {outcome.best_step}, which is kept"
    )
    return Result(trained, (note, *student.notes), _ranges(student, graph, sample))


def _ranges(student: Student, graph: Any, sample: Tensors) -> tuple[LearnedRange, ...]:
    """Read every grid, with the fingerprint of its tensor in the float form of the trained model."""
    import torch
    from torch import fx

    class Watching(fx.Interpreter):  # type: ignore[misc]
        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            if n.name in student.grids:
                prints[n.name] = Fingerprint.of(result.detach().numpy())
            return result

    prints: dict[str, Fingerprint] = {}
    with torch.no_grad():
        Watching(graph).run(*sample)
    return tuple(
        LearnedRange(name, *grid.span(), prints[name])
        for name, grid in student.grids.items()
        if name in prints
    )
