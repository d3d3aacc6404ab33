# SPDX-License-Identifier: Apache-2.0
"""A model folder with a tokenizer becomes a package that takes texts: built, installed, asked with a sentence."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt.compare import compare
from edgeopt.evaluate.texts import TextPreprocess, read
from edgeopt_agent.client import Client
from edgeopt_agent.inference import read_data
from edgeopt_agent.machine import Installed
from edgeopt_agent.serve.http import LocalServer
from edgeopt_agent.serve.models import Models
from edgeopt_agent.store import Store
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

pytestmark = pytest.mark.flow
EDGEOPT = str(Path(sys.executable).with_name("edgeopt"))
LENGTH, WIDTH = 12, 16
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "the",
    "pump",
    "is",
    "hot",
    "cold",
    "##er",
    "valve",
    "open",
    "ed",
    "no",
    "##w",
    ".",
    "!",
    "run",
    "##s",
    "e",
]
TEXTS = [
    "The pump is hot.", "the valve is open", "Valve opened!", "now it runs", "colder", "no", "THE PUMP RUNS HOTTER.",
    "[MASK] is cold", "é the hot", "the " * 40, "", "\u200bpump\tis\u00a0hot", "日本 pump",
]  # fmt: skip
RECIPE = """
name = "words"
version = "1"
runtimes = ["onnxruntime"]
precisions = ["int8-dynamic"]
[postprocess]
kind = "embed"
pool = "mean"
mask = "attention_mask"
[serving]
max_batch = 4
"""


def tokenizer_document(**changes: Any) -> dict[str, Any]:
    tokens = [*SPECIAL, *WORDS]
    document: dict[str, Any] = {
        "version": "1.0", "truncation": {"max_length": 10, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for number, token in enumerate(SPECIAL)
        ],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [],
            "special_tokens": {name: {"id": name, "ids": [tokens.index(name)], "tokens": [name]}
                               for name in ("[CLS]", "[SEP]")},
        },
        "decoder": None,
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": {token: number for number, token in enumerate(tokens)},
        },
    }  # fmt: skip
    return {**document, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a model comes from a hub: `onnx/model.onnx`, and the tokenizer above it."""
    from onnx import TensorProto, helper, numpy_helper, save

    made = tmp_path / "hub"
    (made / "onnx").mkdir(parents=True)
    (made / "tokenizer.json").write_text(json.dumps(tokenizer_document()))
    rng = np.random.default_rng(0)
    table = rng.normal(size=(len(SPECIAL) + len(WORDS), WIDTH)).astype(np.float32)
    weight = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Cast", ["attention_mask"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["real", "last"], ["column"]),
        helper.make_node("Mul", ["words", "column"], ["marked"]),
        helper.make_node("MatMul", ["marked", "weight"], ["hidden"]),
    ]
    graph = helper.make_graph(
        nodes, "words",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["n", LENGTH]) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["n", LENGTH, WIDTH])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "weight"),
         numpy_helper.from_array(np.int64([-1]), "last")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    save(model, made / "onnx/model.onnx")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return made


def build(folder: Path, more: str = "") -> subprocess.CompletedProcess[str]:
    place = folder.parent
    (place / "recipe.toml").write_text(RECIPE + more)
    return subprocess.run(
        [EDGEOPT, "build", folder / "onnx/model.onnx", "--device", "host", "--recipe", place / "recipe.toml", "--calibration",
         place / "texts.txt", "--evaluation", place / "texts.txt", "--quick", "--json", "-o", place],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip


def test_a_folder_with_a_tokenizer_becomes_a_package_that_takes_sentences(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    package = folder.parent / report["package"]
    store = Store(folder.parent / "state")
    with zipfile.ZipFile(package) as content:
        content.extractall(store.slot("words", "A"))
    manifest = store.manifest("words", "A")
    assert manifest.preprocess == {
        "kind": "text", "vocabulary": "vocab.txt", "lower_case": True, "max_length": 10,
    }  # fmt: skip
    assert "vocab.txt" in {entry.path for entry in manifest.files}
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.enable_padding(length=LENGTH)
    models = Models(store)
    models.activate("words", Installed("A", "1", "0" * 64, manifest.variants[0].id))
    server = LocalServer(folder.parent / "s.sock", models)
    server.start()
    try:
        with Client(folder.parent / "s.sock") as client:
            assert client.metadata("words")["parameters"]["accepts"] == "text"
            found = client.infer("words", {"input_ids": TEXTS[:4]}, ["embedding"]).outputs["embedding"]
            for row, text in enumerate(TEXTS):
                encoded = reference.encode(text)
                arrays = {
                    "input_ids": np.int64([encoded.ids]),
                    "attention_mask": np.int64([encoded.attention_mask]),
                }
                by_numbers = client.infer("words", arrays, ["hidden", "embedding"]).outputs
                by_text = client.infer("words", {"input_ids": text}, ["hidden", "embedding"]).outputs
                np.testing.assert_array_equal(by_text["hidden"], by_numbers["hidden"], err_msg=text)
                np.testing.assert_array_equal(by_text["embedding"], by_numbers["embedding"], err_msg=text)
                if row < 4:
                    np.testing.assert_allclose(by_text["embedding"][0], found[row], atol=0.02)
    finally:
        server.stop()
    assert compare(str(package), str(package), str(folder.parent / "texts.txt")).is_equal
    (folder.parent / "ask.txt").write_text(TEXTS[0])
    asked = read_data(folder.parent / "ask.txt", manifest, store.slot("words", "A"))
    assert asked["input_ids"][0].tolist() == [*reference.encode(TEXTS[0]).ids[:LENGTH]]
    ran = subprocess.run(
        [EDGEOPT, "run", package, folder.parent / "ask.txt", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["outputs"]["hidden"]["shape"] == [1, LENGTH, WIDTH]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "model.type is 'Unigram'"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "pre_tokenizer is 'ByteLevel'"),
        ({"added_tokens": [{"id": 21, "content": "<tool>"}]}, "added token '<tool>'"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "post_processor is 'RobertaProcessing'"),
        ({"padding": {"direction": "Left"}}, "padding.direction is 'Left'"),
    ],
)
def test_a_tokenizer_that_a_device_does_not_know_is_refused_by_what_it_is(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_document(**changes)))
    with pytest.raises(RecipeError, match="send token numbers") as caught:
        read(path)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("more", "says"),
    [('kind = "txt"', "text"), ('kind = "text"', "vocabulary"), ('kind = "text"\nvocabulary = "none.json"', "none.json"),
     ('kind = "text"\nvocabulary = "."\nlowercase = true', "lower_case")],
)  # fmt: skip
def test_keys_that_are_wrong_end_the_build(folder: Path, more: str, says: str) -> None:
    done = build(folder, f"[preprocess]\n{more}\n")
    assert done.returncode == 2
    assert says in done.stderr


def test_a_vocabulary_alone_says_what_its_config_or_the_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    assert TextPreprocess.from_mapping({"vocabulary": str(tmp_path)}).lower_case
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    found = TextPreprocess.from_mapping(
        {"kind": "text", "vocabulary": str(tmp_path / "vocab.txt"), "max_length": 6}
    )
    assert (found.lower_case, found.most) == (False, 6)
    with pytest.raises(RecipeError, match="integer inputs of one shape"):
        found.fitted([TensorSpec("image", (1, 3, 8, 8), "float32")])
