# SPDX-License-Identifier: Apache-2.0
"""Error rates by hand from CTC outputs, with labels as text, as indexes, and without."""

from pathlib import Path

import numpy as np
import pytest

from edgeopt.evaluate.outputs import Outputs
from edgeopt.evaluate.scores import Scores
from edgeopt.evaluate.tasks import load_task
from edgeopt_wire.errors import RecipeError

ALPHABET = "abc "
FRAMES = 12


def _frames(*texts: str, blank: int = 0) -> np.ndarray:
    """One-hot CTC frames that say the texts: a blank after every symbol."""
    found = np.zeros((len(texts), FRAMES, len(ALPHABET) + 1), np.float32)
    symbols = list(ALPHABET)
    symbols.insert(blank, "")
    for row, text in enumerate(texts):
        path = [index for letter in text for index in (symbols.index(letter), blank)]
        for frame in range(FRAMES):
            found[row, frame, path[frame] if frame < len(path) else blank] = 1
    return found


def _score(said: np.ndarray, labels: object, baseline: np.ndarray | None = None, **options: object) -> Scores:
    known = None if labels is None else np.asarray(labels)
    outputs = Outputs({"y": said}, known)
    reference = outputs if baseline is None else Outputs({"y": baseline}, known)
    return load_task("speech", {"alphabet": ALPHABET, **options}).score(outputs, reference)


def test_error_rates_by_hand() -> None:
    found = _score(_frames("ab c", "b", "ca b"), ["ab c", "bb", "a b c"])
    # Words: 0 of 2, 1 of 1, 2 of 3 (a -> ca, c missing). Characters: 0 of 4, 1 of 2, and "ca b" is 3 edits from "a b c".
    assert found.find("wer").value == pytest.approx(3 / 6)
    assert found.find("cer").value == pytest.approx((0 + 1 + 3) / 11)
    assert found.find("exact").value == pytest.approx(1 / 3)
    assert [score.higher_is_better for score in found.scores] == [False, False, True]


@pytest.mark.parametrize("blank", [0, 2, 4])
def test_the_blank_may_stand_anywhere_and_symbols_first(blank: int) -> None:
    said = _frames("abc", "cab", blank=blank)
    assert _score(said, ["abc", "cab"], blank=blank).find("cer").value == 0
    assert _score(said.swapaxes(1, 2), ["abc", "cab"], blank=blank, symbols_first=True).find("cer").value == 0


def test_labels_may_be_indexes_padded_with_minus_one() -> None:
    assert _score(_frames("ab", "c"), [[1, 2, -1], [3, 1, -1]]).find("cer").value == pytest.approx(1 / 4)


def test_word_pieces_and_case() -> None:
    said = np.eye(3, dtype=np.float32)[[[1, 0, 2, 0]]]
    outputs = Outputs({"y": said}, np.array(["HELLO world"]))
    task = load_task("speech", {"symbols": ["hello", " world"], "lower": True})
    assert task.score(outputs, outputs).find("wer").value == 0


def test_a_long_list_of_symbols_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "symbols.txt"
    file.write_text("a\nb\nc\n \n", encoding="utf-8")
    found = _score(_frames("ab c"), ["ab c"], alphabet="", symbols_file=str(file))
    assert found.find("cer").value == 0


def test_without_labels_the_baselines_text_is_the_truth() -> None:
    found = _score(_frames("ab", "ac"), None, _frames("ab", "ab"))
    assert found.find("cer_from_baseline").value == pytest.approx(1 / 4)
    assert _score(_frames("ab"), None).find().value == 0


def test_long_texts_count_more() -> None:
    found = _score(_frames("a", "abcab"), ["b", "abcab"]).find("cer")
    assert found.value == pytest.approx(1 / 6)
    assert found.weigh is not None
    assert found.weigh(np.array([2.0, 0.0])) == 1


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a"], {"alphabet": "ab"}, r"with 3 symbols \(2 and the blank\), found \(1, 12, 5\)"),
        ([0.5], {}, "expects texts, or rows of symbol indexes"),
        ([[7]], {}, "labels run from 7 to 7"),
        ([""], {}, "all are empty"),
        (["a"], {"symbols": ["a"]}, "one of `alphabet`"),
        (["a"], {"alphabet": "", "symbols_file": "nowhere.txt"}, r"cannot read the symbols .*nowhere\.txt"),
        (["a"], {"blank": 5}, "blank must be an index from 0 to 4"),
    ],
)
def test_what_does_not_fit_is_refused(labels: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _score(_frames("a"), labels, **options)
