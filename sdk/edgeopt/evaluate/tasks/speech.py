# SPDX-License-Identifier: Apache-2.0
"""Speech and text recognition with CTC: word error rate and character error rate.

Rules:
- The output is (samples, frames, symbols), or with `symbols_first` (samples, symbols, frames); index `blank` says nothing.
- `alphabet` holds one character a symbol, in the order of the indexes, the blank left out; longer symbols (word pieces)
  stand in `symbols`, long lists one a line in `symbols_file`, a path as the command line would name it. Labels are
  texts, or rows of symbol indexes padded with -1.
- An error rate is all edits over all words (characters) of the labels, so a long sentence counts more than a short one;
  it can be above 1.
- Without labels the baseline's own text stands for them: how much the candidate's text differs.
- Text is compared as it is, but for white space at the ends and repeated; lower-case it where the labels are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.evaluate import expect
from edgeopt.evaluate.scores import Score, Scores, mean_score
from edgeopt.evaluate.text import ctc_greedy, edit_distance
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs


@dataclass(frozen=True)
class Options:
    """`lower` compares in lower case; the other options are told above."""

    output: str = ""
    alphabet: str = ""
    symbols: tuple[str, ...] = ()
    symbols_file: str = ""
    blank: int = 0
    symbols_first: bool = False
    lower: bool = False

    def __post_init__(self) -> None:
        if (bool(self.alphabet), bool(self.symbols), bool(self.symbols_file)).count(True) != 1:
            raise ValueError(
                "give one of `alphabet` (one character a symbol), `symbols` (a list) and `symbols_file` (one a line), "
                "the blank left out"
            )


def check(options: Options) -> None:
    """Read the symbols.

    Raises:
        RecipeError: The file cannot be read, or the blank is beyond the symbols.
    """
    _spelling(options)


def score(outputs: Outputs, baseline: Outputs, options: Options) -> Scores:
    """Tell the word error rate where there are spaces between words, and the character error rate.

    Raises:
        RecipeError: The output is no row of symbols a frame, or the labels are neither texts nor rows of indexes.
    """
    spelling = _spelling(options)
    said = _texts(outputs, options, spelling)
    if outputs.labels is None and outputs.annotations is None:
        return Scores(_rates(_texts(baseline, options, spelling), said, "_from_baseline"))
    return Scores(_rates(_labels(outputs, spelling), said, ""))


def _rates(truth: list[str], said: list[str], suffix: str) -> tuple[Score, ...]:
    import numpy as np

    characters = _rate(f"cer{suffix}", [list(text) for text in truth], [list(text) for text in said])
    exact = mean_score(f"exact{suffix}", np.asarray([a == b for a, b in zip(truth, said, strict=True)]))
    if not any(" " in text for text in truth):
        return characters, exact
    words = _rate(f"wer{suffix}", [text.split() for text in truth], [text.split() for text in said])
    return words, characters, exact


def _rate(name: str, truth: list[list[str]], said: list[list[str]]) -> Score:
    import numpy as np

    edits = np.asarray([edit_distance(a, b) for a, b in zip(truth, said, strict=True)], np.float64)
    lengths = np.asarray([len(text) for text in truth], np.float64)
    if not lengths.any():
        raise RecipeError(f"{name}: expected a text in at least one label, all are empty")

    def weigh(weights: np.ndarray) -> float:
        length = float(weights @ lengths)
        return float(weights @ edits) / length if length else float("nan")

    value = float(edits.sum() / lengths.sum())
    return Score(name, value, len(edits), higher_is_better=False, is_share=True, weigh=weigh)


@dataclass(frozen=True)
class _Spelling:
    """What every index says; the blank says nothing."""

    symbols: tuple[str, ...]
    lower: bool

    def text(self, text: str) -> str:
        """The text as it is compared."""
        plain = " ".join(text.split())
        return plain.lower() if self.lower else plain

    def spell(self, indexes: Sequence[int]) -> str:
        """The text of symbol indexes."""
        return self.text("".join(self.symbols[index] for index in indexes))


def _spelling(options: Options) -> _Spelling:
    known = list(options.alphabet or options.symbols)
    if options.symbols_file:
        path = Path(options.symbols_file)
        try:
            known = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the symbols {path.absolute()}: {error}") from error
    if not 0 <= options.blank <= len(known):
        raise RecipeError(f"blank must be an index from 0 to {len(known)}, found {options.blank}")
    known.insert(options.blank, "")
    return _Spelling(tuple(known), options.lower)


def _texts(outputs: Outputs, options: Options, spelling: _Spelling) -> list[str]:
    found = expect.output(outputs, options.output)
    count = len(spelling.symbols)
    axis = 1 if options.symbols_first else 2
    if found.ndim != 3 or found.shape[axis] != count:
        raise RecipeError(
            f"speech expects an output (samples, {'symbols, frames' if axis == 1 else 'frames, symbols'}) with {count} "
            f"symbols ({count - 1} and the blank), found {found.shape}"
        )
    frames = found.swapaxes(1, 2) if options.symbols_first else found
    return [spelling.spell(ctc_greedy(sample, options.blank)) for sample in frames]


def _labels(outputs: Outputs, spelling: _Spelling) -> list[str]:
    labels = expect.labels(outputs, "texts")
    if labels.dtype.kind == "U" and labels.ndim == 1:
        return [spelling.text(str(text)) for text in labels]
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise RecipeError(
            f"speech expects texts, or rows of symbol indexes padded with -1, as labels; found {labels.dtype} "
            f"{labels.shape}"
        )
    expect.check_classes(labels[labels >= 0], len(spelling.symbols))
    return [spelling.spell([int(index) for index in row if index >= 0]) for row in labels]
