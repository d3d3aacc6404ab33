# SPDX-License-Identifier: Apache-2.0
"""A text becomes a model's input, by the `preprocess` keys of a manifest: WordPiece, as BERT and its children have it.

Keys: `vocabulary` (a file of the package, one token a line), `lower_case` (true), `max_length` (tokens that are
kept of a text; the input's own length, or less). Inputs are filled by name: one with "mask" in it gets 1 for a token and 0
for padding, one with "type" zeros, the other the ids. Longer texts are cut, shorter ones padded to the input's length;
`[CLS]` and `[SEP]` stand at the ends, and a special token that stands in the text, as `[MASK]`, is that token.

Source: Devlin et al. 2018, and the reference tokenizer's rules: control characters go, CJK characters and punctuation
stand alone, accents are stripped (NFD) when lower-casing, then the longest known piece first.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError, StoreError
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KEYS = ("kind", "vocabulary", "lower_case", "max_length")
MAX_TEXT_BYTES = 1024 * 1024
_MAX_WORD = 100
_CJK = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


class WordPiece:
    """A vocabulary and how texts are cut by it."""

    def __init__(
        self, tokens: Sequence[str], *, is_lower: bool, most: int, inputs: Sequence[TensorSpec]
    ) -> None:
        self._ids = {token: number for number, token in enumerate(tokens)}
        missing = [token for token in SPECIAL[:4] if token not in self._ids]
        if missing:
            raise RecipeError(
                f"the vocabulary has no {missing[0]}; expected one of WordPiece, a token a line"
            )
        self._is_lower = is_lower
        self._most = most
        self._length = inputs[0].shape[1]
        known = [re.escape(token) for token in SPECIAL if token in self._ids]
        self._special = re.compile(f"({'|'.join(known)})")
        self._inputs = tuple(inputs)

    def encode(self, texts: Sequence[bytes]) -> dict[str, np.ndarray]:
        """Turn UTF-8 texts into the model's inputs, (texts, length) each.

        Raises:
            RecipeError: One is no UTF-8, or too long to look at.
        """
        import numpy as np

        ids = np.full((len(texts), self._length), self._ids["[PAD]"], np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            found = self.ids(text)
            ids[row, : len(found)] = found
            mask[row, : len(found)] = 1
        return {
            spec.name: (
                mask if "mask" in spec.name else np.zeros_like(ids) if "type" in spec.name else ids
            ).astype(spec.dtype)
            for spec in self._inputs
        }

    def ids(self, text: bytes) -> list[int]:
        """The token numbers of one text, ends included, cut to the most that are kept."""
        if len(text) > MAX_TEXT_BYTES:
            raise RecipeError(f"a text of {len(text)} bytes; at most {MAX_TEXT_BYTES} are read")
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"a text must be UTF-8: {error}") from error
        found = [self._ids["[CLS]"]]
        for number, part in enumerate(self._special.split(decoded)):
            if number % 2:
                found.append(self._ids[part])
                continue
            for word in self._words(part):
                found += self._pieces(word)
                if len(found) >= self._most - 1:
                    break
        return [*found[: self._most - 1], self._ids["[SEP]"]]

    def _words(self, text: str) -> list[str]:
        cleaned = "".join(_spaced(character) for character in text)
        if self._is_lower:
            decomposed = unicodedata.normalize("NFD", cleaned.lower())
            cleaned = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
        return "".join(f" {c} " if _is_punctuation(c) else c for c in cleaned).split()

    def _pieces(self, word: str) -> list[int]:
        if len(word) > _MAX_WORD:
            return [self._ids["[UNK]"]]
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                number = self._ids.get(("##" if start else "") + word[start:end])
                if number is not None:
                    break
            else:
                return [self._ids["[UNK]"]]
            found.append(number)
            start = end
        return found


def make_tokenizer(vocabulary: Path, keys: Mapping[str, Any], signature: Sequence[TensorSpec]) -> WordPiece:
    """Read the vocabulary of a package.

    Raises:
        RecipeError: An unknown key, or inputs that are not (1, tokens).
        StoreError: The vocabulary cannot be read.
    """
    for key in keys:
        if key not in KEYS:
            raise RecipeError(f"preprocess text: {seam.unknown('key', key, KEYS)}")
    shapes = {spec.shape for spec in signature}
    if len(shapes) != 1 or len(signature[0].shape) != 2:
        raise RecipeError(
            f"preprocess text fits inputs of one shape (1, tokens), the model takes {sorted(shapes)}"
        )
    length = signature[0].shape[1]
    most = keys.get("max_length", length)
    if type(most) is not int or not 2 < most <= length:
        raise RecipeError(
            f"preprocess text: max_length {most}, expected 3 to {length}, which the input {signature[0].name!r} has"
        )
    try:
        tokens = vocabulary.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"cannot read the vocabulary {vocabulary.name}: {error}") from error
    while tokens and not tokens[-1]:
        tokens.pop()
    is_lower = bool(keys.get("lower_case", True))
    return WordPiece([t.rstrip("\r") for t in tokens], is_lower=is_lower, most=most, inputs=signature)


def _spaced(character: str) -> str:
    code = ord(character)
    if character in "\t\n\r" or unicodedata.category(character) == "Zs":
        return " "
    if code in (0, 0xFFFD) or unicodedata.category(character).startswith("C"):
        return ""
    return f" {character} " if any(low <= code <= high for low, high in _CJK) else character


def _is_punctuation(character: str) -> bool:
    code = ord(character)
    is_ascii = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return is_ascii or unicodedata.category(character).startswith("P")
