# SPDX-License-Identifier: Apache-2.0
"""An ONNX graph while rules rewrite it: who writes what, who reads it, constants as arrays.

Nodes are copies that live as long as the editor, so that rules can hold them; `program` sorts and writes them back.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_products import reads

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.fusion.moments import Moments


class Editor:
    """A copy of a program's main graph under rewriting."""

    def __init__(self, program: Any) -> None:
        import onnx

        self._program = onnx.ModelProto()
        self._program.CopyFrom(program)
        graph = self._program.graph
        self._nodes: list[Any] = []
        self._writers: dict[str, Any] = {}
        self._readers: dict[str, list[Any]] = defaultdict(list)
        edges = {value.name for value in graph.input}
        self._constants = {t.name: t for t in graph.initializer if t.name not in edges}
        self._outputs = {value.name for value in graph.output}
        self._ranks = {
            info.name: len(info.type.tensor_type.shape.dim)
            for info in (*graph.value_info, *graph.input, *graph.output)
            if info.type.tensor_type.HasField("shape")
        }
        self.opset = next((e.version for e in program.opset_import if e.domain in ("", "ai.onnx")), 1)
        self.statistics: dict[str, Moments] = {}
        for node in graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            self.add(copy)

    def nodes(self) -> tuple[Any, ...]:
        """Every node now, in no particular order after the first rewrite."""
        return tuple(self._nodes)

    def writer(self, name: str) -> Any | None:
        """The node that writes a tensor; None for inputs of the model and constants."""
        return self._writers.get(name)

    def readers(self, name: str) -> tuple[Any, ...]:
        """The nodes that read a tensor, once for every use; a node with a subgraph that reads it counts."""
        return tuple(self._readers.get(name, ()))

    def is_output(self, name: str) -> bool:
        """Whether a tensor leaves the model."""
        return name in self._outputs

    def is_private(self, name: str) -> bool:
        """Whether exactly one use of a tensor exists, inside the graph."""
        return not self.is_output(name) and len(self._readers.get(name, ())) == 1

    def rank(self, name: str) -> int | None:
        """How many axes a tensor has, where shape inference knew it."""
        return self._ranks.get(name)

    def constant(self, name: str) -> np.ndarray | None:
        """The values of a constant, or None where it is none."""
        import onnx

        tensor = self._constants.get(name)
        return None if tensor is None else onnx.numpy_helper.to_array(tensor)

    def scalar(self, name: str) -> float | None:
        """The one value of a float constant, or None where it is none or has several different ones."""
        values = self.constant(name)
        if values is None or values.dtype.kind != "f" or not values.size:
            return None
        first = float(values.reshape(-1)[0])
        return first if bool((values == first).all()) else None

    def weight(self, name: str) -> np.ndarray | None:
        """A float32 constant as float64, or None."""
        values = self.constant(name)
        return values.astype("float64") if values is not None and values.dtype == "float32" else None

    def add(self, node: Any, behind: Any | None = None) -> None:
        """Take a node in, at the end or right behind another one."""
        places = (place for place, entry in enumerate(self._nodes) if entry is behind)
        self._nodes.insert(next(places, len(self._nodes)) + 1, node)
        self._link(node)

    def _link(self, node: Any) -> None:
        for name in reads(node):
            if name:
                self._readers[name].append(node)
        for name in node.output:
            if name:
                self._writers[name] = node

    def remove(self, node: Any) -> None:
        """Take a node out; its outputs have no writer until something else writes them."""
        self._nodes = [entry for entry in self._nodes if entry is not node]
        self._unlink(node)

    def _unlink(self, node: Any) -> None:
        for name in reads(node):
            if name:
                kept = self._readers[name]
                kept.pop(next(place for place, entry in enumerate(kept) if entry is node))
        for name in node.output:
            if self._writers.get(name) is node:
                del self._writers[name]

    def change(self, node: Any, inputs: list[str], outputs: list[str] | None = None) -> None:
        """Give a node other inputs and outputs; it stays where it is."""
        self._unlink(node)
        node.input[:] = inputs
        if outputs is not None:
            node.output[:] = outputs
        self._link(node)

    def become(self, node: Any, kind: str, inputs: list[str], **given: Any) -> None:
        """Make a node one of another type with these attributes, which writes what it wrote first."""
        import onnx

        made = onnx.helper.make_node(kind, inputs, [node.output[0]], node.name, **given)
        self._unlink(node)
        node.CopyFrom(made)
        self._link(node)

    def put(self, values: np.ndarray, wanted: str) -> str:
        """Keep float32 values as a constant under the wanted name, or one like it where it is taken."""
        import onnx

        name, number = wanted, 1
        while name in self._constants or name in self._writers or name in self._ranks:
            name, number = f"{wanted}_{number}", number + 1
        self._constants[name] = onnx.numpy_helper.from_array(values.astype("float32"), name)
        return name

    def replace(self, node: Any, position: int, values: np.ndarray) -> str:
        """The name under which `node` finds new values for a constant input; others keep reading the old ones."""
        import onnx

        name = str(node.input[position])
        if len(self._readers[name]) == 1 and not self.is_output(name):
            self._constants[name] = onnx.numpy_helper.from_array(values.astype("float32"), name)
            return name
        return self.put(values, f"{name}_fused")

    def program(self) -> Any:
        """Write everything back, sorted, without constants that nobody reads."""
        import onnx

        graph = self._program.graph
        ordered = self._sorted()
        del graph.node[:]
        graph.node.extend(ordered)
        used = {name for node in ordered for name in reads(node)} | self._outputs
        edges = {value.name for value in graph.input}
        defaults = [
            onnx.TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in edges
        ]
        del graph.initializer[:]
        graph.initializer.extend([*defaults, *(t for name, t in self._constants.items() if name in used)])
        written = {name for node in ordered for name in node.output}
        shapes = [
            onnx.ValueInfoProto.FromString(i.SerializeToString())
            for i in graph.value_info
            if i.name in written
        ]
        del graph.value_info[:]
        graph.value_info.extend(shapes)
        return self._program

    def _sorted(self) -> list[Any]:
        """Topological order that keeps the order of the nodes wherever it can."""
        places = {id(node): place for place, node in enumerate(self._nodes)}
        waiting = {id(n): sum(name in self._writers for name in reads(n)) for n in self._nodes}
        ready = [places[id(node)] for node in self._nodes if not waiting[id(node)]]
        found: list[Any] = []
        while ready:
            node = self._nodes[heapq.heappop(ready)]
            found.append(node)
            for reader in (entry for name in node.output for entry in self._readers.get(name, ())):
                waiting[id(reader)] -= 1
                if not waiting[id(reader)]:
                    heapq.heappush(ready, places[id(reader)])
        return found
