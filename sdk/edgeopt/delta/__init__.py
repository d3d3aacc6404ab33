# SPDX-License-Identifier: Apache-2.0
"""Deltas between two packages of one model, aligned by the names of its tensors.

How a delta is made:
- Files of the same path are compared. Tensors of the same name and size are taken as differences of bytes, byte for byte
  modulo 256: fine-tuning moves an integer by a step or two, so that most differences are 0, 1 or 255.
- What lies between tensors, and files without any, are matched by blocks; what matches nothing travels as it is.
- Where a difference would not be shorter than the bytes themselves (floats, a tensor that was replaced), the bytes travel.

Sources: Percival 2003, "Naive differences of executable code"; Tridgell 1999, "Efficient algorithms for sorting and
synchronization" (blocks).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgeopt.delta.blocks import match
from edgeopt.delta.spans import spans_of
from edgeopt_wire.archive import PackageReader
from edgeopt_wire.delta import COPY, DIFFERENCE, LITERAL, Operation, write_delta
from edgeopt_wire.index import PackageIndex

WORTH = 0.9
"""A delta of more than this share of the package is not made: the package itself can be resumed and shared."""

Span = tuple[int, int]


@dataclass
class Script:
    """A delta as it grows."""

    base: bytes
    target: bytes
    operations: list[Operation] = field(default_factory=list)
    differences: bytearray = field(default_factory=bytearray)
    literals: bytearray = field(default_factory=bytearray)

    def tensor(self, base: Span, target: Span) -> None:
        """A tensor of the same name and size."""
        old, new = self._bytes(base, target)
        if old == new:
            self._add(COPY, base, target)
            return
        changes = _difference(old, new)
        if _packed(changes) < _packed(new):
            self._add(DIFFERENCE, base, target)
            self.differences += changes
        else:
            self._literal(new)

    def other(self, base: Span, target: Span) -> None:
        """Bytes without a name, by blocks."""
        old, new = self._bytes(base, target)
        done = 0
        for at, source, length in match(old, new):
            self._literal(new[done:at])
            self._add(COPY, (base[0] + source, length), (target[0] + at, length))
            done = at + length
        self._literal(new[done:])

    def _bytes(self, base: Span, target: Span) -> tuple[bytes, bytes]:
        return self.base[base[0] : sum(base)], self.target[target[0] : sum(target)]

    def _literal(self, content: bytes) -> None:
        if not content:
            return
        if self.operations and self.operations[-1].kind == LITERAL:
            self.operations[-1] = Operation(LITERAL, self.operations[-1].length + len(content))
        else:
            self.operations.append(Operation(LITERAL, len(content)))
        self.literals += content

    def _add(self, kind: int, base: Span, target: Span) -> None:
        """Append, joined to the last where both go on in one piece."""
        last = self.operations[-1] if self.operations else None
        if last is not None and last.kind == kind and last.base + last.length == base[0]:
            self.operations[-1] = Operation(kind, last.length + target[1], last.base)
        elif target[1]:
            self.operations.append(Operation(kind, target[1], base[0]))


def make_delta(base: tuple[Path, PackageIndex], target: tuple[Path, PackageIndex], file: Path) -> bool:
    """Write into `file` how the target package is made of the base package; say whether that is worth it.

    Raises:
        DocumentError: One of them is no package.
        StoreError: One cannot be read.
    """
    script = Script(base[0].read_bytes(), target[0].read_bytes())
    old, new = _members(base[0]), _members(target[0])
    done, behind = 0, 0
    for name, span in sorted(new.items(), key=lambda entry: entry[1]):
        source = old.get(name, (behind, 0))
        # what lies between two members (their headers) is compared with what lies before the same member in the base
        script.other((behind, max(0, source[0] - behind)), (done, span[0] - done))
        _member(script, name, source, span)
        done, behind = sum(span), sum(source) if name in old else behind
    script.other((behind, len(script.base) - behind), (done, len(script.target) - done))
    about = {
        "base_sha256": base[1].sha256,
        "target_sha256": target[1].sha256,
        "target_bytes": target[1].size_bytes,
    }
    with file.open("wb") as into:
        write_delta(into, script.operations, bytes(script.differences), bytes(script.literals), about)
    return file.stat().st_size <= WORTH * target[1].size_bytes


def _members(path: Path) -> dict[str, Span]:
    """Where each file of a package lies in it."""
    with PackageReader(path) as reader:
        return {entry.path: reader.place(entry.path) for entry in reader.manifest.files}


def _member(script: Script, name: str, base: Span, target: Span) -> None:
    """One file: its tensors by name, what lies between them by blocks."""
    old, new = (
        content[span[0] : sum(span)] for content, span in ((script.base, base), (script.target, target))
    )
    pairs = list(_pairs(spans_of(name, old), spans_of(name, new)))
    if old == new or (not pairs and len(old) == len(new)):
        script.tensor(base, target)
        return
    here = behind = 0
    for source, found in pairs:
        script.other((base[0] + behind, max(0, source[0] - behind)), (target[0] + here, found[0] - here))
        script.tensor((base[0] + source[0], source[1]), (target[0] + found[0], found[1]))
        here, behind = sum(found), sum(source)
    script.other((base[0] + behind, max(0, base[1] - behind)), (target[0] + here, target[1] - here))


def _pairs(old: dict[str, Span], new: dict[str, Span]) -> Iterator[tuple[Span, Span]]:
    """Tensors of the same name and size, in the order of the new file, none twice."""
    end = 0
    for name, span in sorted(new.items(), key=lambda entry: entry[1]):
        if span[0] >= end and name in old and old[name][1] == span[1]:
            end = sum(span)
            yield old[name], span


def _difference(old: bytes, new: bytes) -> bytes:
    import numpy as np

    found: bytes = (np.frombuffer(new, np.uint8) - np.frombuffer(old, np.uint8)).tobytes()
    return found


def _packed(content: bytes) -> int:
    return len(zlib.compress(content, 1))
