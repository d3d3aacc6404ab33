# SPDX-License-Identifier: Apache-2.0
"""The operators of an ONNX file, found again by the names that OpenVINO gives to what it made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeopt_wire.errors import RuntimeFailure

CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass
class Source:
    """The operators of the file by name, and by the tensors that they make."""

    program: Any
    reference: Mapping[str, str]
    operators: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, file: Path, reference: Path | None) -> Source:
        """Read the file, and how another calls the same tensors."""
        names = {}
        if reference is not None:
            graph = _load(reference).graph
            names = {name: node.name for node in graph.node for name in node.output if node.name}
        return cls(_load(file), names)

    def __post_init__(self) -> None:
        for node in self.program.graph.node:
            self.operators.update(dict.fromkeys(node.output, node))
        self.operators.update({node.name: node for node in self.program.graph.node if node.name})

    @property
    def is_quantized(self) -> bool:
        """Whether anything in the file is an integer that stands for a real number."""
        return any(node.op_type in CONVERSIONS for node in self.program.graph.node)

    def merged(self, names: Sequence[str]) -> list[Any]:
        """The operators of the file that a node of these names was made of, without quantization."""
        return [operator for operator in self._behind(names) if operator.op_type not in CONVERSIONS]

    def quantizes(self, names: Sequence[str]) -> bool:
        """Whether a QuantizeLinear was merged into a node."""
        return any(operator.op_type == "QuantizeLinear" for operator in self._behind(names))

    def _behind(self, merged: Sequence[str]) -> list[Any]:
        names = (name for given in merged for name in _shortened(given))
        return list({id(found): found for name in names if (found := self.operators.get(name))}.values())

    def label(self, operator: Any) -> str:
        """What the reference calls an operator, or the file."""
        output = next(iter(operator.output), "")
        return self.reference.get(output, operator.name or output)


def _load(file: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(file, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise RuntimeFailure(f"cannot read {file.name}: {error}") from error


def _shortened(name: str) -> Iterator[str]:
    """A name as the file may have it: what OpenVINO makes of an operator is called NAME/WHAT."""
    yield name
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name
