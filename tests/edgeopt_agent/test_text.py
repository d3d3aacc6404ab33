# SPDX-License-Identifier: Apache-2.0
"""WordPiece cuts texts exactly as the reference tokenizer does, over scripts, accents, emoji and nonsense."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt_agent.text import make_tokenizer
from edgeopt_wire.errors import RecipeError, StoreError
from edgeopt_wire.tensor import TensorSpec

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "run",
    "##ning",
    "##s",
    "un",
    "##believ",
    "##able",
    "naive",
    "cafe",
    "##ing",
]
PUNCTUATION = "!?.,;:'\"()[]{}<>+-*/=$%&@#~^`|_"
OTHERS = [*"ABCDEé", *PUNCTUATION, "日", "本", "語", "über", "uber", "Ü", "straße", "и", "##и", "🙂"]
TOKENS = list(dict.fromkeys([*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS, *OTHERS]))
LENGTH = 24
SIGNATURE = [
    TensorSpec(name, (1, LENGTH), "int64") for name in ("input_ids", "attention_mask", "token_type_ids")
]
TEXTS = [
    "", " ", "The quick brown fox.", "running unbelievable cafés naïve", "日本語 text", "über Über ÜBER straße",
    "a\tb\nc\rd\u00a0e\u2003f", "x" * 101, "x" * 100, "don't!!", "\x00\x01\ufffdbad\x7f", "🙂 ok 🙂🙂", "e\u0301 é É",
    "и и́ и", "many words " * 40, "$5.00 + 3% = {a|b}~", "a [MASK] b[SEP]c [CLS][PAD] [mask] [UNK]", "[MASK]" * 30, "[[MASK]]",
    "\u200bzero\u200bwidth\u00ad", "ﬁ ligature İ I \u0131",
]  # fmt: skip


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("is_lower", [True, False])
def test_ids_are_those_of_the_reference_tokenizer(vocabulary: Path, is_lower: bool) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.BertWordPieceTokenizer(str(vocabulary), lowercase=is_lower)
    reference.enable_truncation(LENGTH)
    ours = make_tokenizer(vocabulary, {"lower_case": is_lower}, SIGNATURE)
    rng = random.Random(0)
    alphabet = [*LETTERS, *" .,'-\n\t", "é", "Ü", "日", "и", "\u0301", "🙂", "\u200b", "ß", "A", "Z"]
    made = ["".join(rng.choices(alphabet, k=rng.randint(0, 60))) for _ in range(500)]
    for text in [*TEXTS, *made]:
        assert ours.ids(text.encode()) == reference.encode(text).ids, repr(text)


def test_inputs_are_filled_by_their_names_and_padded(vocabulary: Path) -> None:
    found = make_tokenizer(vocabulary, {}, SIGNATURE).encode([b"the fox", b"fox"])
    assert set(found) == {"input_ids", "attention_mask", "token_type_ids"}
    ids = [TOKENS.index(token) for token in ("[CLS]", "the", "fox", "[SEP]")]
    assert found["input_ids"][0, :5].tolist() == [*ids, TOKENS.index("[PAD]")]
    assert found["attention_mask"].sum(axis=1).tolist() == [4, 3]
    assert not found["token_type_ids"].any()
    assert all(array.shape == (2, LENGTH) and array.dtype == np.int64 for array in found.values())


@pytest.mark.parametrize(
    ("keys", "family"),
    [({"lowercase": True}, RecipeError), ({"max_length": 25}, RecipeError), ({"max_length": 2}, RecipeError)],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused(
    vocabulary: Path, keys: dict[str, Any], family: type[Exception]
) -> None:
    with pytest.raises(family):
        make_tokenizer(vocabulary, keys, SIGNATURE)


def test_a_missing_vocabulary_and_a_text_that_is_none_are_refused(vocabulary: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        make_tokenizer(tmp_path / "none.txt", {}, SIGNATURE)
    with pytest.raises(RecipeError, match="UTF-8"):
        make_tokenizer(vocabulary, {}, SIGNATURE).encode([b"\xff\xfe"])
