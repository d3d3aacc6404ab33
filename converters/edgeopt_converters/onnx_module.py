# SPDX-License-Identifier: Apache-2.0
"""An ONNX program as a torch.nn.Module: decided once by running it, then a list of steps.

Rules:
- The plan is made with one real run on example inputs, so every shape is known when an operator asks for it.
- A node whose inputs are all known beforehand is no step; its outputs are constants.
- A constant becomes a parameter or a buffer only when an operator asks for it as a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt_converters.onnx_ops import ADVICE, Call, Function, Tensor, table
from edgeopt_wire.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np

_RANDOM = (
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
)
_STATISTICS = {"BatchNormalization": (3, 4)}
"""Inputs that are measured, not learned."""

_OURS = ("GatherElements",)
"""Constants that PyTorch computes: ONNX's reference implementation fails where an axis is long."""


@dataclass(frozen=True)
class _Step:
    """One node to run: reads tensors by name, gives tensors by name."""

    function: Function
    type: str
    name: str
    opset: int
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    constants: tuple[np.ndarray | None, ...]
    outputs: tuple[str, ...]

    def run(self, lookup: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Run with `lookup` giving each input by name."""

        def value(index: int) -> Tensor | None:
            return lookup(self.inputs[index]) if self.inputs[index] else None

        wanted = max((index + 1 for index, name in enumerate(self.outputs) if name), default=0)
        call = Call(self.type, self.name, self.opset, self.attributes, value, self.constants, wanted)
        found = self.function(call)
        results = found if isinstance(found, tuple) else (found,)
        if len(results) < wanted:
            raise call.refuse(f"{wanted} outputs are asked for, {len(results)} are known")
        return {name: result for name, result in zip(self.outputs, results, strict=False) if name}


def build_module(program: Any, examples: Sequence[Tensor]) -> Any:
    """Return a torch.nn.Module in evaluation mode that takes and returns flat tuples of tensors.

    Its `places` say which of its parameters or buffers is which initializer: ONNX name -> attribute.

    Raises:
        UnsupportedError: An operator has no form in PyTorch.
    """
    import torch
    from onnx.inliner import inline_local_functions

    program = inline_local_functions(program)
    inputs = [value.name for value in program.graph.input]
    outputs = [value.name for value in program.graph.output]
    planner = _Planner(program, dict(zip(inputs, examples, strict=True)))
    with torch.no_grad():
        planner.walk(program.graph)
        for name in outputs:
            planner.lookup(name)
    return _module(planner, inputs, outputs)


class _Planner:
    """Runs the program once and keeps what depends on its inputs as steps."""

    def __init__(self, program: Any, tensors: dict[str, Tensor]) -> None:
        self.steps: list[_Step] = []
        self.weights: dict[str, Tensor] = {}
        self.buffers: set[str] = set()
        self._tensors = tensors
        self._constants: dict[str, np.ndarray] = {}
        self._table = table()
        self._opsets = {opset.domain or "ai.onnx": opset.version for opset in program.opset_import}

    def lookup(self, name: str) -> Tensor:
        """A tensor by name; a constant becomes a weight of the module when it is first asked for."""
        if name in self._tensors:
            return self._tensors[name]
        if name not in self.weights:
            self.weights[name] = _as_tensor(name, self._constants[name])
        return self.weights[name]

    def walk(self, graph: Any) -> None:
        from onnx import numpy_helper

        for initializer in graph.initializer:
            self._constants[initializer.name] = numpy_helper.to_array(initializer)
        for node in graph.node:
            self._add(node)

    def _add(self, node: Any) -> None:
        import numpy as np

        if node.op_type == "If":
            self._branch(node)
        elif node.op_type in ("Shape", "Size") and node.input[0] in self._tensors:
            shape = np.array(self._tensors[node.input[0]].shape, np.int64)
            self._fold(node, {node.input[0]: np.empty(tuple(shape), np.bool_)})
        elif self._is_constant(node):
            self._fold(node, {name: self._constants[name] for name in node.input if name})
        else:
            self._step(node)

    def _is_constant(self, node: Any) -> bool:
        has_graph = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
        return (
            node.op_type not in _RANDOM
            and not has_graph
            and node.domain in ("", "ai.onnx")
            and all(not name or name in self._constants for name in node.input)
        )

    def _fold(self, node: Any, known: Mapping[str, np.ndarray]) -> None:
        if node.op_type in _OURS:
            step = self._made(node, node.op_type, tuple(node.input), tuple(node.output))
            found = self._try(step, node, lambda name: _as_tensor(name, known[name]))
            self._constants.update({name: tensor.numpy() for name, tensor in found.items()})
        else:
            self._refer(node, known)

    def _refer(self, node: Any, known: Mapping[str, np.ndarray]) -> None:
        """Compute a constant with ONNX's reference implementation."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        lone = onnx.NodeProto()
        lone.CopyFrom(node)
        names = [name for name in node.output if name]
        graph = onnx.helper.make_graph(
            [lone],
            "constant",
            [onnx.ValueInfoProto(name=name) for name in known],
            [onnx.ValueInfoProto(name=name) for name in names],
        )
        opset = onnx.helper.make_opsetid("", self._opsets["ai.onnx"])
        try:
            results = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset])).run(
                names, dict(known)
            )
        except Exception as error:  # the reference implementation raises what its NumPy code raises
            raise self._refusal(
                node, f"ONNX's reference implementation cannot compute it: {error}"
            ) from error
        self._constants.update(zip(names, results, strict=True))

    def _branch(self, node: Any) -> None:
        """Take the branch that a constant condition chooses."""
        if node.input[0] not in self._constants:
            raise self._refusal(node, "its condition depends on the model's input")
        chosen = "then_branch" if bool(self._constants[node.input[0]]) else "else_branch"
        branch = next(attribute.g for attribute in node.attribute if attribute.name == chosen)
        self.walk(branch)
        for inner, outer in zip(branch.output, node.output, strict=True):
            if inner.name in self._constants:
                self._constants[outer] = self._constants[inner.name]
            else:
                self._run(self._made(node, "Identity", (inner.name,), (outer,)), node)

    def _step(self, node: Any) -> None:
        if node.domain not in ("", "ai.onnx"):
            raise self._refusal(node, f"operators of the domain {node.domain!r} have no PyTorch form here")
        if node.op_type not in self._table:
            raise self._refusal(node, "it has no PyTorch form here")
        for position in _STATISTICS.get(node.op_type, ()):
            self.buffers.update(node.input[position : position + 1])
        self._run(self._made(node, node.op_type, tuple(node.input), tuple(node.output)), node)

    def _made(self, node: Any, kind: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> _Step:
        import onnx

        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if not a.HasField("g")}
        return _Step(
            function=self._table[kind],
            type=kind,
            name=node.name,
            opset=self._opsets["ai.onnx"],
            attributes={
                name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()
            },
            inputs=inputs,
            constants=tuple(self._constants.get(name) for name in inputs),
            outputs=outputs,
        )

    def _run(self, step: _Step, node: Any) -> None:
        self._tensors.update(self._try(step, node, self.lookup))
        self.steps.append(step)

    def _try(self, step: _Step, node: Any, lookup: Callable[[str], Tensor]) -> dict[str, Tensor]:
        try:
            return step.run(lookup)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            reason = f"{error}".partition("\n")[0]
            raise self._refusal(node, f"PyTorch cannot compute it: {reason}") from error

    def _refusal(self, node: Any, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"onnx_to_torch: {node.op_type} (node {node.name!r}, opset {self._opsets.get('ai.onnx')}): {why}; {ADVICE}"
        )


def _as_tensor(name: str, array: np.ndarray) -> Tensor:
    import numpy as np
    import torch

    try:
        return torch.from_numpy(np.array(array))
    except TypeError as error:
        raise UnsupportedError(
            f"onnx_to_torch: constant {name!r} is {array.dtype}, which PyTorch has not; {ADVICE}"
        ) from error


def _module(planner: _Planner, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    import torch

    places = _places(planner.weights)

    class OnnxModule(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in planner.weights.items():
                is_learned = (
                    tensor.dtype.is_floating_point and tensor.numel() > 1 and name not in planner.buffers
                )
                if is_learned:
                    self.register_parameter(places[name], torch.nn.Parameter(tensor))
                else:
                    self.register_buffer(places[name], tensor)

        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip(inputs, tensors, strict=True))

            def lookup(name: str) -> Tensor:
                return values[name] if name in values else getattr(self, places[name])

            for step in planner.steps:
                values.update(step.run(lookup))
            return tuple(lookup(name) for name in outputs)

    found = OnnxModule().eval()
    found.places = places
    return found


def _places(names: Mapping[str, Tensor]) -> dict[str, str]:
    """A unique attribute name for each weight, as close to its ONNX name as Python allows."""
    import torch

    found: dict[str, str] = {}
    taken = set(dir(torch.nn.Module()))
    for name in names:
        plain = re.sub(r"\W", "_", name)
        place = plain = f"w_{plain}" if not plain[:1].isalpha() else plain
        number = 1
        while place in taken:
            place, number = f"{plain}_{number}", number + 1
        taken.add(place)
        found[name] = place
    return found
