# SPDX-License-Identifier: Apache-2.0
"""A client sends a JPEG or a text and gets what the package's pre- and postprocess make of it."""

import io
import json
from typing import Any

import numpy as np
import pytest

from edgeopt_agent.images import MAX_PIXELS, photo_tensor
from edgeopt_agent.serve.served import Call
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

Rig = Any
Image = pytest.importorskip("PIL.Image")
SIDE = 8
PHOTO_KEYS = {"resize": SIDE, "crop": SIDE, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
SPEC = TensorSpec("image", (1, 3, SIDE, SIDE), "float32", "NCHW")
LABELS = "red\ngreen\nblue\n"


def photo_package(rig: Rig, **options: Any) -> None:
    """A net that says the mean of every third of its input: of a photo, of every colour."""
    edge = {
        "name": "image",
        "shape": [1, 3, SIDE, SIDE],
        "dtype": "float32",
        "layout": "NCHW",
        "affine": None,
    }
    scores = {"name": "scores", "shape": [1, 3], "dtype": "float32", "layout": "", "affine": None}
    changes = {
        "signature_inputs": [edge], "signature_outputs": [scores], "preprocess": PHOTO_KEYS,
        "postprocess": {"kind": "classify", "top": 2}, "labels": "labels.txt",
    }  # fmt: skip
    variants = [{**_variant(), "inputs": [edge], "outputs": [scores]}]
    rig.install(changes={**changes, "variants": variants, **options}, files={"labels.txt": LABELS})


def _variant() -> dict[str, Any]:
    return {
        "id": "a", "runtime": "null", "precision": "fp32", "file": "variants/a.json", "golden": "golden/outputs/tiny",
        "min_sqnr_db": 30.0,
    }  # fmt: skip


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30), form: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, form)
    return out.getvalue()


def post(rig: Rig, content: bytes, kind: str, path: str = "/v2/models/tiny/infer") -> tuple[int, Any]:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    answer = rig.raw(head.encode() + content)
    return int(answer.split()[1]), json.loads(answer.split(b"\r\n\r\n", 1)[1])


def test_a_bare_photo_gives_labels(rig: Rig) -> None:
    photo_package(rig)
    for form in ("JPEG", "PNG"):
        code, found = post(rig, jpeg((0, 250, 90), form=form), f"image/{form.lower()}")
        outputs = {entry["name"]: entry for entry in found["outputs"]}
        assert code == 200
        assert outputs["top_label"]["data"] == ["green", "blue"]
        assert outputs["top_index"]["data"] == [1, 2]
        assert outputs["top_score"]["data"][0] == pytest.approx(250 / 255, abs=0.02)


def test_the_client_sends_a_photo_or_pixels_and_chooses_outputs(rig: Rig) -> None:
    photo_package(rig)
    photo = jpeg((200, 10, 10), form="PNG")
    pixels = np.asarray(Image.open(io.BytesIO(photo)))[None]
    with rig.client() as client:
        by_file = client.infer("tiny", {"image": photo}, ["scores", "top_label"])
        by_pixels = client.infer("tiny", {"image": pixels}, ["scores"])
        metadata = client.metadata("tiny")
    expected = photo_tensor(photo, PHOTO_KEYS, SPEC)[0].mean(axis=(1, 2))
    np.testing.assert_allclose(by_file.outputs["scores"][0], expected, rtol=1e-5)
    np.testing.assert_array_equal(by_file.outputs["scores"], by_pixels.outputs["scores"])
    assert by_file.outputs["top_label"].tolist() == [[b"red", b"green"]]
    assert set(by_pixels.outputs) == {"scores"}
    assert metadata["parameters"]["accepts"] == "image"
    assert [entry["name"] for entry in metadata["parameters"]["postprocess"]] == [
        "top_index",
        "top_score",
        "top_label",
    ]


@pytest.mark.parametrize("content", [b"", b"no photo", jpeg((1, 2, 3))[:200], b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_photo_is_400(rig: Rig, content: bytes) -> None:
    photo_package(rig)
    code, found = post(rig, content, "image/jpeg")
    assert code == 400
    assert "cannot read the image" in found["error"]


def test_a_photo_that_would_fill_the_memory_is_refused_before_it_is_decoded() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, "PNG")
    with pytest.raises(RecipeError, match="at most"):
        photo_tensor(out.getvalue(), PHOTO_KEYS, SPEC)
    with pytest.raises(RecipeError, match="when resized"):
        photo_tensor(jpeg((1, 1, 1), (1, 60_000)), {**PHOTO_KEYS, "resize": 256, "crop": 8}, SPEC)


def test_a_known_photo_is_answered_without_decoding_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    photo_package(rig, serving={"response_cache": {}})
    photo = jpeg((9, 9, 9))
    first = rig.models.answer("tiny", Call({"image": [photo]}, ("top_label",)))[1]
    monkeypatch.setattr("edgeopt_agent.images._decode", None)
    again = rig.models.answer("tiny", Call({"image": [photo]}, ("top_label",)))[1]
    assert again.parameters["cache"] == "response"
    assert again.outputs["top_label"].tolist() == first.outputs["top_label"].tolist()


def test_texts_become_tokens_and_a_vector(rig: Rig) -> None:
    ids, mask = (
        {"name": name, "shape": [1, 6], "dtype": "int64", "layout": "", "affine": None}
        for name in ("ids", "mask")
    )
    hidden = {"name": "hidden", "shape": [1, 6, 1], "dtype": "float32", "layout": "", "affine": None}
    changes = {
        "signature_inputs": [ids, mask], "signature_outputs": [hidden],
        "variants": [{**_variant(), "inputs": [ids, mask], "outputs": [hidden]}],
        "preprocess": {"kind": "text", "vocabulary": "vocab.txt"},
        "postprocess": {"kind": "embed", "pool": "mean", "mask": "mask", "normalize": False},
    }  # fmt: skip
    rig.install(changes=changes, files={"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\nhello\nworld\n"})
    with rig.client() as client:
        found = client.infer("tiny", {"ids": "Hello world"}, ["hidden", "embedding"])
    assert found.outputs["hidden"].reshape(-1).tolist() == [2, 4, 5, 3, 0, 0]
    assert found.outputs["embedding"].tolist() == [[(2 + 4 + 5 + 3) / 4]]
    code, bare = post(rig, b"hello", "text/plain; charset=utf-8")
    assert code == 200
    assert bare["outputs"][0]["data"] == [pytest.approx((2 + 4 + 3) / 3)]


def test_a_package_without_preprocess_says_what_to_send(rig: Rig) -> None:
    rig.install()
    code, found = post(rig, jpeg((1, 1, 1)), "image/jpeg")
    assert code == 400
    assert "send float32 [1, 2, 4, 4]" in found["error"]
