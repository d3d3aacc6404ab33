# SPDX-License-Identifier: Apache-2.0
"""What a connection said last: the same bytes mean the same, so they are parsed once and answered in the same words.

Rules:
- A request is kept where its JSON alone says what it means: every tensor behind it lies where it lay before (the
  connection's own buffer, or sealed memory), as a view. A tensor that had to be copied (unaligned, BYTES) is not kept, or
  the next request would get the old values.
- It is forgotten with its model, and with any shared region that goes.
- The JSON of an answer is kept where it holds no values: tensors in binary or in shared memory, of the same shapes.

Why? Of 0.12 ms that a request with shared memory took over the run, half was reading and writing the same JSON again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from edgeopt_agent.serve.http1 import KEPT_BYTES

if TYPE_CHECKING:
    import numpy as np

    from edgeopt_agent.serve.protocol import InferRequest
    from edgeopt_agent.serve.served import Answer, Call, Served

    Asking = tuple[InferRequest, Call]
    Write = Callable[[str, int, memoryview], None]

MOST_BYTES = 4096
"""JSON of up to this size is remembered."""


class Repeats:
    """The last request of one connection and the words of its answer. Belongs to that connection's thread."""

    def __init__(self) -> None:
        self._raw = b""
        self._served: Served | None = None
        self._generation = -1
        self._behind: object = None
        self._size = 0
        self._asking: Asking | None = None
        self._words: _Words | None = None

    def find(self, raw: bytes, binary: memoryview, served: Served, generation: int) -> Asking | None:
        """The request that these bytes are, if they are those of the one before and mean the same."""
        is_same = (
            self._served is served
            and self._generation == generation
            and self._raw == raw
            and self._size == len(binary)
            and self._behind is _memory(binary)
        )
        return self._asking if is_same else None

    def keep(self, raw: bytes, binary: memoryview, served: Served, generation: int, asking: Asking) -> None:
        """Remember a request, which the caller knows to be one that may be."""
        self._words = None
        if len(raw) > MOST_BYTES or len(binary) > KEPT_BYTES:
            self._asking = None
            return
        self._raw, self._served, self._generation = raw, served, generation
        self._behind, self._size, self._asking = _memory(binary), len(binary), asking

    def forget(self) -> None:
        """Remember nothing."""
        self._asking = self._words = None

    def words(self, request: InferRequest, answer: Answer) -> bytes | None:
        """The JSON of this answer, if it is that of the one before."""
        kept = self._words
        if kept is None or kept.request is not request or kept.parameters != answer.parameters:
            return None
        return kept.content if kept.edges == _edges(request, answer.outputs) else None

    def keep_words(self, request: InferRequest, answer: Answer, content: bytes) -> None:
        """Remember the words of the answer to the request that is remembered."""
        if self._asking is None or self._asking[0] is not request:
            return
        is_bare = all(wish.region or (wish.is_binary and not wish.top) for wish in request.outputs)
        if not is_bare or (not request.outputs and not request.is_binary):
            return
        if any(array.dtype.kind == "O" for array in answer.outputs.values()):
            return
        self._words = _Words(request, dict(answer.parameters), _edges(request, answer.outputs), content)


class _Words:
    __slots__ = ("content", "edges", "parameters", "request")

    def __init__(
        self, request: InferRequest, parameters: Mapping[str, Any], edges: list[Any], content: bytes
    ) -> None:
        self.request, self.parameters, self.edges, self.content = request, parameters, edges, content


def tensors_behind(
    request: InferRequest, outputs: Mapping[str, np.ndarray], write: Write | None
) -> list[memoryview]:
    """The binary tensors of an answer whose words are known; those for shared memory are put there."""
    from edgeopt_agent.serve.datatypes import bytes_of

    if not request.outputs:
        return [bytes_of(array) for array in outputs.values()]
    found = []
    for wish in request.outputs:
        content = bytes_of(outputs[wish.name])
        if not wish.region:
            found.append(content)
        elif write is not None:
            write(wish.region, wish.offset, content)
    return found


def _edges(request: InferRequest, outputs: Mapping[str, np.ndarray]) -> list[Any]:
    names = [wish.name for wish in request.outputs] or list(outputs)
    return [(name, outputs[name].shape, outputs[name].dtype) if name in outputs else name for name in names]


def _memory(binary: memoryview) -> object:
    """What the tensors lie in; nothing where there are none."""
    return binary.obj if len(binary) else None
