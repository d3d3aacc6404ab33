# SPDX-License-Identifier: Apache-2.0
"""A client that sends the same words again with other values gets other answers: what is remembered is never a value."""

import json
import struct
from typing import Any

import numpy as np
import pytest

from edgeopt_wire.errors import RecipeError

Rig = Any
SHAPE = [1, 2, 4, 4]


def image(*scores: float) -> np.ndarray:
    return np.repeat(np.float32(scores), 8).reshape(SHAPE)


def ask(wire: Any, entry: dict[str, Any], tensors: bytes = b"", **body: Any) -> list[float]:
    """One infer request on a connection that stays; the answer's first output."""
    from edgeopt_agent.client_wire import head_of

    document = {"inputs": [entry], **body}
    text = json.dumps(document).encode()
    head = head_of("POST", "/v2/models/tiny/infer", len(text) + len(tensors), split=len(text))
    reply = wire.request(head + text, [tensors] if tensors else [])
    return list(json.loads(bytes(reply.content))["outputs"][0]["data"])


def test_the_same_words_with_other_tensors_get_other_answers(rig: Rig) -> None:
    rig.install()
    with rig.client() as client:
        for turn in range(4):
            given = image(turn, 9, turn + 2, 3)
            found = client.infer("tiny", {"image": given}).outputs["scores"]
            assert found.tolist() == [[turn, 9, turn + 2, 3]]
            kept = client.infer("tiny", {"image": image(7, 7, 7, 7)}).outputs["scores"]
            assert found.tolist() == [[turn, 9, turn + 2, 3]], "an answer is the caller's own"
            assert kept.tolist() == [[7] * 4]
        with client.share("tiny") as shared:
            for turn in range(4):
                shared.inputs["image"][...] = image(turn, 1, 1, turn)
                assert shared.run()["scores"].tolist() == [[turn, 1, 1, turn]]


def test_requests_that_differ_take_turns_on_one_connection(rig: Rig) -> None:
    rig.install(
        changes={"labels": "labels.txt", "postprocess": {"top": 1}}, files={"labels.txt": "a\nb\nc\nd\n"}
    )
    rig.install("other", gain=2.0)
    with rig.client() as client, client.share("other") as shared:
        for turn in (1.0, 2.0):
            given = image(turn, 9, 5, 3)
            shared.inputs["image"][...] = given
            assert client.infer("tiny", {"image": given}, ["top_label"]).outputs["top_label"].tolist() == [
                [b"b"]
            ]
            assert client.infer("other", {"image": given}).outputs["scores"][0, 0] == 2 * turn
            assert shared.run()["scores"][0, 0] == 2 * turn
            assert client.infer("tiny", {"image": given}, timeout_s=5.0).outputs["scores"][0, 0] == turn
            with pytest.raises(RecipeError, match="expected"):
                client.infer("tiny", {"image": given.astype(np.float64)})


def test_a_new_version_answers_what_was_asked_of_the_old_one(rig: Rig) -> None:
    rig.install(gain=1.0)
    with rig.client() as client, client.share("tiny") as shared:
        shared.inputs["image"][...] = image(1, 2, 3, 4)
        for version in range(1, 5):
            rig.install(version=str(version), slot="AB"[version % 2], gain=float(version))
            assert client.infer("tiny", {"image": image(1, 2, 3, 4)}).version == str(version)
            for _ in range(2):
                assert shared.run()["scores"][0, 0] == version


def test_memory_that_cannot_be_looked_at_in_place_is_read_again(rig: Rig) -> None:
    """An unaligned tensor and a text are copied out of shared memory: the copy must not answer the next request."""
    rig.install()
    with rig.client() as client:
        import fcntl
        import mmap
        import os

        file = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(file, 4096)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        memory = mmap.mmap(file, 4096)
        from edgeopt_agent.client_wire import head_of

        wire = client._connection
        body = b'{"byte_size": 4096}'
        wire.request(
            head_of("POST", "/v2/edgeopt/memory/region/r/register", len(body)) + body, descriptor=file
        )
        os.close(file)
        for offset in (0, 1):
            where = {
                "shared_memory_region": "r",
                "shared_memory_offset": offset,
                "shared_memory_byte_size": 128,
            }
            entry = {"name": "image", "datatype": "FP32", "shape": SHAPE, "parameters": where}
            for turn in (1.0, 2.0, 3.0):
                memory[offset : offset + 128] = image(turn, 9, 5, 3).tobytes()
                assert ask(wire, entry)[0] == turn, offset


def test_a_text_in_shared_memory_is_read_again(rig: Rig) -> None:
    edge = {"name": "ids", "shape": [1, 6], "dtype": "int64", "layout": "", "affine": None}
    out = {"name": "hidden", "shape": [1, 6, 1], "dtype": "float32", "layout": "", "affine": None}
    variant = {
        "id": "a", "runtime": "null", "precision": "fp32", "file": "variants/a.json", "golden": "golden/outputs/tiny",
        "min_sqnr_db": 30.0, "inputs": [edge], "outputs": [out],
    }  # fmt: skip
    changes = {
        "signature_inputs": [edge], "signature_outputs": [out], "variants": [variant],
        "preprocess": {"kind": "text", "vocabulary": "vocab.txt"},
    }  # fmt: skip
    rig.install(changes=changes, files={"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\nhello\nworld\n"})
    with rig.client() as client:
        wire = client._connection
        for word, number in (("hello", 4), ("world", 5)):
            packed = struct.pack("<I", 5) + word.encode()
            entry = {
                "name": "ids",
                "datatype": "BYTES",
                "shape": [1],
                "parameters": {"binary_data_size": len(packed)},
            }
            assert ask(wire, entry, packed)[:3] == [2, number, 3]
