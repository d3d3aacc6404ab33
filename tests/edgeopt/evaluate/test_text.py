# SPDX-License-Identifier: Apache-2.0
"""CTC by hand, and the laws that a distance between texts obeys."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.evaluate.text import ctc_greedy, edit_distance

TEXT = st.text("abc", max_size=12)


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),
    ],
)
def test_known_distances(one: str, other: str, edits: int) -> None:
    assert edit_distance(one, other) == edits


def test_words_are_compared_as_wholes() -> None:
    assert edit_distance(["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "sit", "on", "mat"]) == 2


@given(TEXT, TEXT, TEXT)
def test_it_is_a_distance(one: str, two: str, three: str) -> None:
    assert edit_distance(one, one) == 0
    assert edit_distance(one, two) == edit_distance(two, one)
    assert edit_distance(one, three) <= edit_distance(one, two) + edit_distance(two, three)
    assert abs(len(one) - len(two)) <= edit_distance(one, two) <= max(len(one), len(two))


@given(TEXT, st.integers(0, 12), st.sampled_from("abc"))
def test_one_insertion_is_one_edit(text: str, place: int, letter: str) -> None:
    assert edit_distance(text, text[:place] + letter + text[place:]) == 1


@pytest.mark.parametrize(
    ("path", "blank", "decoded"),
    [
        ([0, 1, 1, 0, 1, 2, 2], 0, (1, 1, 2)),  # a blank between parts a repetition
        ([0, 0, 0], 0, ()),
        ([2, 0, 0, 2], 2, (0,)),
        ([1], 0, (1,)),
    ],
)
def test_ctc_joins_repetitions_and_leaves_blanks_out(
    path: list[int], blank: int, decoded: tuple[int, ...]
) -> None:
    assert ctc_greedy(np.eye(3)[path], blank) == decoded
