# SPDX-License-Identifier: Apache-2.0
"""Speech and text recognition with CTC: word error rate and character error rate.

Rules:
- The output is (samples, frames, symbols), or with `symbols_first` (samples, symbols, frames); index `blank` says nothing.
- `alphabet` holds one character a symbol, in the order of the indexes, the blank left out; longer symbols (word pieces)
  stand in `symbols`. Labels are texts, or rows of symbol indexes padded with -1.
- An error rate is all edits over all words (characters) of the labels, so a long sentence counts more than a short one;
  it can be above 1.
- Without labels the baseline's own text stands for them: how much the candidate's text differs.
- Text is compared as it is, but for white space at the ends and repeated; lower-case it where the labels are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    blank: int = 0
    symbols_first: bool = False
    lower: bool = False

    def __post_init__(self) -> None:
        if bool(self.alphabet) == bool(self.symbols):
            raise ValueError(
                "give either `alphabet` (one character a symbol) or `symbols` (a list), the blank left out"
            )
        if not 0 <= self.blank <= len(self.alphabet or self.symbols):
            raise ValueError(
                f"blank must be an index from 0 to {len(self.alphabet or self.symbols)}, found {self.blank}"
            )

    def spell(self, indexes: Sequence[int]) -> str:
        """The text of symbol indexes."""
        known = list(self.alphabet or self.symbols)
        known.insert(self.blank, "")
        text = " ".join("".join(known[index] for index in indexes).split())
        return text.lower() if self.lower else text


def score(outputs: Outputs, baseline: Outputs, options: Options) -> Scores:
    """Tell the word error rate where there are spaces between words, and the character error rate.

    Raises:
        RecipeError: The output is no row of symbols a frame, or the labels are neither texts nor rows of indexes.
    """
    said = _texts(outputs, options)
    if outputs.labels is None and outputs.annotations is None:
        return Scores(_rates(_texts(baseline, options), said, "_from_baseline"))
    return Scores(_rates(_labels(outputs, options), said, ""))


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


def _texts(outputs: Outputs, options: Options) -> list[str]:
    found = expect.output(outputs, options.output)
    count = len(options.alphabet or options.symbols) + 1
    axis = 1 if options.symbols_first else 2
    if found.ndim != 3 or found.shape[axis] != count:
        raise RecipeError(
            f"speech expects an output (samples, {'symbols, frames' if axis == 1 else 'frames, symbols'}) with {count} "
            f"symbols ({count - 1} and the blank), found {found.shape}"
        )
    frames = found.swapaxes(1, 2) if options.symbols_first else found
    return [options.spell(ctc_greedy(sample, options.blank)) for sample in frames]


def _labels(outputs: Outputs, options: Options) -> list[str]:
    labels = expect.labels(outputs, "texts")
    if labels.dtype.kind == "U" and labels.ndim == 1:
        texts = [" ".join(str(text).split()) for text in labels]
        return [text.lower() for text in texts] if options.lower else texts
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise RecipeError(
            f"speech expects texts, or rows of symbol indexes padded with -1, as labels; found {labels.dtype} "
            f"{labels.shape}"
        )
    expect.check_classes(labels[labels >= 0], len(options.alphabet or options.symbols) + 1)
    return [options.spell([int(index) for index in row if index >= 0]) for row in labels]
