# SPDX-License-Identifier: Apache-2.0
"""Models by name, texts that calibrate apart from texts that evaluate, and data that is not here."""

import numpy as np
import pytest
import registry
from models import ABOUT, About, Place
from work import Unavailable, Work

FAMILIES = {
    "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "keyword-spotter", "minilm", "ocr", "resnet8",
    "silero-vad", "silero-vad-flat", "vision-transformer",
}  # fmt: skip


def test_every_model_is_found_by_name():
    assert set(registry.families()) == FAMILIES
    assert set(registry.QUICK) <= FAMILIES


def test_an_unknown_model_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(Unavailable, match=r"no model 'vgg'; known: .*resnet8"):
        registry.prepared("vgg", tmp_path)


def test_a_model_whose_data_is_not_here_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGEOPT_DATA", raising=False)
    with pytest.raises(Unavailable, match="set EDGEOPT_DATA to a folder that holds it"):
        Place("resnet8", tmp_path, tmp_path).data("mlperf-tiny/pretrainedResnet.tflite")


def test_a_prepared_model_is_made_anew_when_its_module_changes(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "minilm"
    folder.mkdir(parents=True)
    About("kept", "embeddings", {}, bits=(4,)).save(folder)
    (folder / registry.STAMP).write_text(registry._digest("minilm"))
    assert registry.prepared("minilm", tmp_path)[1].description == "kept"
    monkeypatch.setattr(registry, "_digest", lambda name: "another")
    assert not registry._is_ready(folder, "minilm")
    assert (folder / ABOUT).is_file()


def test_paragraphs_that_calibrate_and_that_evaluate_are_of_other_documents():
    pytest.importorskip("sklearn")
    from paragraphs import LEAST, paragraphs

    one, other = paragraphs(0, 128), paragraphs(1, 300)
    assert (len(set(one)), len(set(other))) == (128, 300)
    assert not set(one) & set(other)
    assert all(len(text) >= LEAST and "\n" not in text for text in (*one, *other))
    with pytest.raises(ValueError, match="expected 100000 paragraphs"):
        paragraphs(0, 100_000)


def test_tables_and_code_are_no_paragraphs():
    from paragraphs import split

    prose = "A sentence that is long enough to be kept, because it goes on and on until\nits end."
    assert list(
        split(
            f"Title\n=====\n\n{prose}\n\n    x = [1, 2, 3][0] + f(2) * {{7: 8}}[7] - 9 + 10 + 11 + 12 + 13.\n"
        )
    ) == [" ".join(prose.split())]


def test_samples_keep_numbers_without_axes(tmp_path):
    np.savez(tmp_path / "calibration.npz", x=np.zeros((2, 1, 3), np.float32), sr=np.full(2, 16000))
    rows = list(Work("p", "v", {}, str(tmp_path / "calibration.npz"), "").samples())
    assert [{name: array.shape for name, array in row.items()} for row in rows] == [
        {"x": (1, 3), "sr": ()}
    ] * 2
