# SPDX-License-Identifier: Apache-2.0
"""English paragraphs that installed packages ship: Python's language reference and scikit-learn's data set descriptions.

No paragraph is in both parts, and neither are two of one document: documents are dealt to the parts by the digest of
their name. What several documents say is the first one's.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

LEAST, MOST = 60, 700
"""Characters; shorter is a heading, longer is cut by every model."""
PARTS = 2


def paragraphs(part: int, count: int) -> list[str]:
    """The first `count` paragraphs of a part (0 or 1), taken from its documents in turn, so that no document rules.

    Raises:
        ValueError: There are fewer.
    """
    seen: set[str] = set()
    queues = []
    for name, text in _documents():
        own = [text for text in dict.fromkeys(split(text)) if text not in seen]
        seen.update(own)
        if zlib.crc32(name.encode()) % PARTS == part:
            queues.append(own)
    found = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    if len(found) < count:
        raise ValueError(f"expected {count} paragraphs, the documents of part {part} have {len(found)}")
    return found[:count]


def split(text: str) -> Iterator[str]:
    """Paragraphs of prose: no tables, no code, no lists of fields; lines joined."""
    for block in re.split(r"\n\s*\n", text):
        plain = " ".join(block.split())
        letters = sum(character.isalpha() or character == " " for character in plain)
        if LEAST <= len(plain) <= MOST and letters > 0.85 * len(plain) and plain[-1] in ".:?!":
            yield plain


def _documents() -> Iterator[tuple[str, str]]:
    from pydoc_data import topics

    import sklearn

    yield from sorted((f"python/{name}", text) for name, text in topics.topics.items())
    for path in sorted((Path(sklearn.__file__).parent / "datasets" / "descr").glob("*.rst")):
        yield f"sklearn/{path.name}", path.read_text(encoding="utf-8")
