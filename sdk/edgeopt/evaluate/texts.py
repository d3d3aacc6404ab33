# SPDX-License-Identifier: Apache-2.0
"""How a text becomes a model's input: a tokenizer's files, read into the vocabulary and keys that a device works by.

Rules:
- The device knows WordPiece (`edgeopt_agent.text`), as BERT and its children have it. A `tokenizer.json` that says anything
  else is refused with the word that it says, never approximated: wrong token numbers look like a bad model.
- A `tokenizer.json` says itself whether it makes letters small, and how many tokens it keeps; a `vocab.txt` says it in the
  `tokenizer_config.json` beside it, or the recipe does.

Source: Hugging Face `tokenizers`, the fields of tokenizer.json; the file names of a Hugging Face model folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.text import KEYS, SPECIAL, WordPiece
from edgeopt_wire import seam
from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    from edgeopt.evaluate.samples import Sample

KIND = "text"
FILE = "vocab.txt"
"""Its name in a package."""

NAMES = ("tokenizer.json", FILE)
"""What a model's folder is searched for, the first of them first."""


@dataclass(frozen=True)
class TextPreprocess:
    """A WordPiece vocabulary and how texts are cut by it. `most` tokens are kept of a text; 0: all that fit."""

    tokens: tuple[str, ...]
    lower_case: bool = True
    most: int = 0

    @classmethod
    def from_mapping(cls, keys: Mapping[str, Any]) -> TextPreprocess:
        """Read a recipe's `[preprocess]` of `kind = "text"`; `vocabulary` is a file, or a folder that holds one.

        Raises:
            RecipeError: An unknown key or wrong value, or a file that is no WordPiece tokenizer.
        """
        for key in keys:
            if key not in KEYS:
                raise RecipeError(f"preprocess text: {seam.unknown('key', key, KEYS)}")
        given = keys.get("vocabulary")
        if not isinstance(given, str) or not given:
            raise RecipeError(
                'preprocess text: say vocabulary = "FILE", a tokenizer.json or a vocab.txt, or their folder'
            )
        path = Path(given)
        if path.is_dir():
            path = find(path) or path / NAMES[0]
        found = read(path)
        lower, most = keys.get("lower_case", found.lower_case), keys.get("max_length", found.most)
        if type(lower) is not bool or type(most) is not int or most < 0:
            raise RecipeError(
                f"preprocess text: lower_case is true or false, max_length a number of tokens; found {lower!r}, {most!r}"
            )
        return cls(found.tokens, lower, most)

    def as_mapping(self) -> dict[str, Any]:
        """The keys of a manifest, whose vocabulary lies in the package as `FILE`."""
        found: dict[str, Any] = {"kind": KIND, "vocabulary": FILE, "lower_case": self.lower_case}
        return {**found, "max_length": self.most} if self.most else found

    def fitted(self, inputs: Sequence[TensorSpec]) -> TextPreprocess:
        """The same for a model with these inputs, which may be shorter than what the tokenizer keeps.

        Raises:
            RecipeError: They are no token numbers, (1, tokens) integers of one shape.
        """
        if not takes_tokens(inputs):
            said = ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in inputs)
            raise RecipeError(
                f"preprocess text fits integer inputs of one shape (1, tokens), the model takes {said}"
            )
        length = inputs[0].shape[1]
        return TextPreprocess(self.tokens, self.lower_case, self.most if 2 < self.most < length else 0)

    def tokenizer(self, inputs: Sequence[TensorSpec]) -> WordPiece:
        """What turns texts into these inputs."""
        most = self.most or inputs[0].shape[1]
        return WordPiece(self.tokens, is_lower=self.lower_case, most=most, inputs=inputs)


@dataclass(frozen=True)
class Texts:
    """The lines of a file as samples."""

    lines: tuple[bytes, ...]
    tokenizer: WordPiece
    digest: str

    def __len__(self) -> int:
        return len(self.lines)

    def __iter__(self) -> Iterator[Sample]:
        from edgeopt.evaluate.samples import Sample

        for line in self.lines:
            yield Sample(self.tokenizer.encode([line]), None)


def open_texts(
    path: Path,
    inputs: tuple[TensorSpec, ...],
    how: object,
    choose: Callable[[list[bytes]], list[bytes]],
) -> Texts:
    """Open a UTF-8 file with a text a line; empty lines are none, and `choose` draws from the others.

    Raises:
        RecipeError: It cannot be read or is empty, or nothing says how texts become inputs.
    """
    if not isinstance(how, TextPreprocess):
        raise RecipeError(
            f"{path}: nothing says how a text becomes this model's input; put [preprocess] with "
            'kind = "text" and vocabulary = "tokenizer.json" into the recipe'
        )
    fitted = how.fitted(inputs)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the texts {path}: {error}") from error
    chosen = tuple(choose([line.encode() for line in lines if line]))
    if not chosen:
        raise RecipeError(f"{path} holds no text; expected one a line")
    content = canonical_bytes([fitted.as_mapping(), list(fitted.tokens), [line.decode() for line in chosen]])
    return Texts(chosen, fitted.tokenizer(inputs), hashlib.sha256(content).hexdigest())


def takes_tokens(inputs: Sequence[TensorSpec]) -> bool:
    """Whether every input is integers of one shape (1, tokens)."""
    shapes = {spec.shape for spec in inputs}
    is_row = len(shapes) == 1 and len(inputs[0].shape) == 2 and inputs[0].shape[0] == 1
    return is_row and inputs[0].shape[1] > 2 and all(spec.dtype in ("int32", "int64") for spec in inputs)


def find(folder: Path) -> Path | None:
    """The tokenizer's file of a model folder, or of the one above where the model lies in its `onnx`."""
    places = (folder, folder.parent) if folder.name == "onnx" else (folder,)
    return next((place / name for place in places for name in NAMES if (place / name).is_file()), None)


def read(path: Path) -> TextPreprocess:
    """Read a `tokenizer.json`, or a vocabulary with a token a line.

    Raises:
        RecipeError: It cannot be read, or is another kind of tokenizer than WordPiece.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return _from_document(json.loads(text), path)
        config = path.with_name("tokenizer_config.json")
        said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read the tokenizer {path}: {error}") from error
    tokens = tuple(line.rstrip("\r") for line in text.rstrip("\n").split("\n"))
    return _checked(TextPreprocess(tokens, said.get("do_lower_case") is not False), path)


def _from_document(document: Any, path: Path) -> TextPreprocess:
    """What a tokenizer.json says, where the device can do just that."""
    model, normalizer = _part(document, "model"), _part(document, "normalizer")
    lower = normalizer.get("lowercase", True)
    truncation, padding = _part(document, "truncation"), _part(document, "padding")
    expected = (
        ("model.type", model.get("type", "WordPiece"), ("WordPiece",)),
        ("model.unk_token", model.get("unk_token"), ("[UNK]",)),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix"), ("##",)),
        ("model.max_input_chars_per_word", model.get("max_input_chars_per_word"), (100,)),
        ("normalizer", normalizer.get("type"), ("BertNormalizer",)),
        ("normalizer.lowercase", lower, (True, False)),
        ("normalizer.clean_text", normalizer.get("clean_text"), (True,)),
        ("normalizer.handle_chinese_chars", normalizer.get("handle_chinese_chars"), (True,)),
        ("normalizer.strip_accents", normalizer.get("strip_accents"), (None, lower)),
        ("pre_tokenizer", _part(document, "pre_tokenizer").get("type"), ("BertPreTokenizer",)),
        ("post_processor", _ends(_part(document, "post_processor")), (["[CLS]", "A", "[SEP]"],)),
        ("truncation.direction", truncation.get("direction", "Right"), ("Right",)),
        ("padding.direction", padding.get("direction", "Right"), ("Right",)),
        ("padding.pad_token", padding.get("pad_token", "[PAD]"), ("[PAD]",)),
    )
    for name, found, allowed in expected:
        if found not in allowed:
            raise RecipeError(
                f"{path}: {name} is {found!r}, a device tokenizes with {' or '.join(map(repr, allowed))} alone (WordPiece, "
                "as BERT has it); leave [preprocess] out, and let clients send token numbers"
            )
    numbers = model.get("vocab")
    if not isinstance(numbers, dict) or sorted(numbers.values()) != list(range(len(numbers))):
        raise RecipeError(f"{path}: model.vocab must number its tokens from 0 without a gap")
    for entry in document.get("added_tokens") or []:
        if entry.get("content") not in SPECIAL or numbers.get(entry["content"]) != entry.get("id"):
            raise RecipeError(
                f"{path}: the added token {entry.get('content')!r} is none of {', '.join(SPECIAL)}; let clients send token "
                "numbers"
            )
    tokens = tuple(sorted(numbers, key=numbers.__getitem__))
    most = truncation.get("max_length", 0)
    return _checked(TextPreprocess(tokens, bool(lower), most if type(most) is int else 0), path)


def _checked(found: TextPreprocess, path: Path) -> TextPreprocess:
    missing = [token for token in SPECIAL[:4] if token not in found.tokens]
    broken = [token for token in found.tokens if "\n" in token]
    if missing or broken:
        what = f"has no {missing[0]}" if missing else f"has a token with a line break, {broken[0]!r}"
        raise RecipeError(f"{path}: the vocabulary {what}; expected WordPiece, as BERT has it")
    return found


def _part(document: Any, key: str) -> Mapping[str, Any]:
    found = document.get(key) if isinstance(document, dict) else None
    return found if isinstance(found, dict) else {}


def _ends(processor: Mapping[str, Any]) -> list[Any] | str:
    """What a post-processor puts around one text."""
    if processor.get("type") == "BertProcessing":
        return [processor["cls"][0], "A", processor["sep"][0]]
    single = processor.get("single")
    if processor.get("type") != "TemplateProcessing" or not isinstance(single, list):
        return str(processor.get("type"))
    return [next(iter(entry.values()))["id"] for entry in single]
