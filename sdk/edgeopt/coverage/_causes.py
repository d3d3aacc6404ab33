# SPDX-License-Identifier: Apache-2.0
"""Why ONNX Runtime left an operator in floats, found by experiment.

Why not a list of what it fuses? Such a list is of one version and one CPU. Here the operator is cut out with its
neighbours, one thing after another is repaired, and the runtime optimizes each cut: what makes it an integer operator is
the reason. If nothing does, not even all repairs at once, the runtime has no integer kernel for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from edgeopt.coverage import _optimized
from edgeopt.coverage._cuts import TARGET, Scope, cut
from edgeopt.coverage._patient import Patient
from edgeopt.coverage._repairs import LAST, LEFT_OUT, MILD, REPAIRS, Said
from edgeopt_wire.errors import RuntimeFailure

RADII = (4, 8, 16)
"""How far a cut reaches, in operators: what stops a fusion is mostly next door; 4 covers DQ, operator, activation, Q."""

ABSORBED = ("Relu", "Clip")
"""What an integer operator may take in, so that nothing is left of it."""

_log = logging.getLogger(__name__)
_Repair = Callable[[Patient], Said | None]
_Repairs = Sequence[_Repair]
_Kind = tuple[str, ...]


class Causes:
    """Finds causes in one model, and remembers them: most operators of a model are left out for the same reason."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._known: list[_Repairs] = []
        self._hopeless: set[_Kind] = set()

    def find(self, scope: Scope, index: int) -> Said:
        """Say why the operator at `index` of `scope` computes in floats, and what would help."""
        kind = _kind(scope, index)
        if kind in self._hopeless:
            return self._no_kernel(scope.nodes[index])
        model = self._reproduced(scope, index)
        if isinstance(model, Said):
            return model
        applicable = [repair for repair in REPAIRS if repair(Patient(model)) is not None]
        for repairs in self._known:
            if set(repairs) <= set(applicable) and (said := _cured(model, repairs)):
                return _joined(said)
        found = _search(model, applicable)
        if found is None:
            self._hopeless.add(kind)
            return self._no_kernel(scope.nodes[index])
        repairs, said = found
        self._known.append(repairs)
        return _joined(said)

    def _no_kernel(self, node: Any) -> Said:
        return Said(
            "no integer kernel",
            f"ONNX Runtime {self._version} has no integer kernel for {node.op_type} here, even with quantized inputs, "
            "weights and output",
            f"leave this {node.op_type} in floats on purpose, or use an operator that runs in integers",
        )

    @staticmethod
    def _reproduced(scope: Scope, index: int) -> Any:
        """The smallest cut in which the operator is in floats as it is in the whole model, or why there is none."""
        found: set[bool | None] = set()
        for radius in RADII:
            model = cut(scope, index, radius=radius)
            found.add(is_integer(model))
            if False in found:
                return model
        if found == {None}:
            return Said(
                "unknown",
                "ONNX Runtime does not load it without the rest of the model, so that no repair can be tried",
                "look at the operators around it in the optimized graph",
            )
        return Said(
            "unknown",
            f"alone, ONNX Runtime runs it in integers; what stops it lies more than {RADII[-1]} operators away",
            "look at the operators around it in the optimized graph",
        )


def _kind(scope: Scope, index: int) -> _Kind:
    """What makes two operators alike: type, attributes, who makes what they read (or its constant type), who reads it."""
    node = scope.nodes[index]
    before = []
    for name in node.input:
        writer, constant = scope.writer(name), scope.constants.get(name)
        before.append(f"constant {constant.data_type} {len(constant.dims)}" if constant is not None else "")
        before[-1] += str(writer.op_type) if writer is not None else ""
    after = sorted(str(reader.op_type) for name in node.output for reader in scope.read_by(name))
    attributes = sorted(str(entry) for entry in node.attribute)
    return (str(node.op_type), "|".join(before), "|".join(after), "|".join(attributes))


def is_integer(model: Any) -> bool | None:
    """Whether the runtime runs a cut's operator in integers; None if it cannot load the cut."""
    try:
        graph = _optimized.optimize(model.SerializeToString(), keep_layout=True).graph
    except RuntimeFailure as error:
        _log.debug("a cut cannot be tried: %s", error)
        return None
    found = [node for node in graph.node if TARGET in node.name]
    if found:
        return all(_takes_integers(graph, node) for node in found)
    target = next(node for node in model.graph.node if node.name == TARGET)
    return target.op_type in ABSORBED  # anything else was merged with float operators under another name


def _takes_integers(graph: Any, node: Any) -> bool:
    if _optimized.is_integer_type(node.op_type):
        return True
    if node.op_type in _optimized.FLOAT_PRODUCTS:
        return False
    name = next(iter(node.input), "")
    writer = next((other for other in graph.node if name in other.output), None)
    if writer is not None:
        return writer.op_type == "QuantizeLinear" or _optimized.is_integer_type(writer.op_type)
    entry = next((value for value in graph.input if value.name == name), None)
    return entry is not None and entry.type.tensor_type.elem_type in _optimized.integer_elements()


def _search(model: Any, applicable: _Repairs) -> tuple[_Repairs, list[Said]] | None:
    """The smallest set of repairs that is found: one alone, else all that help with the needless taken away."""
    for repair in sorted(applicable, key=lambda repair: repair not in MILD):
        if alone := _cured(model, (repair,)):
            return (repair,), alone
    # one repair can make work for another (new weights want a new bias), so that all are asked here
    needed: _Repairs = [repair for repair in REPAIRS if repair not in LAST]
    said = _cured(model, needed)
    if not said:
        needed = REPAIRS
        said = _cured(model, needed)
    if not said:
        return None
    for repair in reversed(tuple(needed)):
        fewer = [other for other in needed if other is not repair]
        if fewer and (less := _cured(model, fewer)):
            needed, said = fewer, less
    found = [repair for repair in needed if repair in applicable]  # the others mend what repairs broke
    patient = Patient(model)
    return needed, [entry for repair in found if (entry := repair(patient)) is not None] or said


def _cured(model: Any, repairs: Iterable[_Repair]) -> list[Said]:
    """What repairs said if they bring the operator into integers, else nothing."""
    patient = Patient(model)
    said = [found for repair in repairs if (found := repair(patient)) is not None]
    return said if said and is_integer(patient.model) else []


def _joined(said: Sequence[Said]) -> Said:
    left_out = next((entry for entry in said if entry.key == LEFT_OUT), None)
    if left_out is not None:  # that says it all: nothing around an operator that was left out is quantized
        return left_out
    return Said(
        " and ".join(entry.key for entry in said),
        "; and ".join(entry.why for entry in said),
        "; and ".join(entry.remedy for entry in said),
    )
