# SPDX-License-Identifier: Apache-2.0
"""A manifest that contradicts itself is refused, and one that is read says what was written."""

from dataclasses import replace

import pytest

from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import DocumentError
from edgeopt_wire.manifest import Compatible, FileEntry, Manifest, Provenance, Quality, Variant
from edgeopt_wire.tensor import Affine, TensorSpec

DIGEST = "cd" * 32
IMAGE = TensorSpec("image", (1, 3, 8, 8), "float32", "NCHW")
SCORES = TensorSpec("scores", (1, 10), "float32")
FLOAT = Variant(
    "ort-fp32", "onnxruntime", "fp32", "variants/a.onnx", (IMAGE,), (SCORES,), "golden/outputs/a", 40.0,
    quality=Quality(100, 1.0, 90.0, "top1", 0.8, 0.8),
)  # fmt: skip
INT8 = replace(FLOAT, id="ort-int8", inputs=(replace(IMAGE, dtype="int8", affine=Affine(0.1, -3)),))
MANIFEST = Manifest(
    "net", "1", "host", Compatible(("host",)), (IMAGE,), (SCORES,), (FLOAT, INT8),
    (FileEntry("variants/a.onnx", 3, DIGEST),), "golden/inputs", {"top1": 0.8}, Provenance(DIGEST, DIGEST),
)  # fmt: skip


def test_a_manifest_comes_back_equal_and_finds_its_parts() -> None:
    again = from_bytes(Manifest, to_bytes(MANIFEST))
    assert again == MANIFEST
    assert again.title == "net 1 for host"
    assert again.variant("ort-int8").inputs[0].affine == Affine(0.1, -3)
    assert again.file("variants/a.onnx").size_bytes == 3
    with pytest.raises(KeyError):
        again.variant("other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ()}, "at least one variant"),
        ({"variants": (FLOAT, FLOAT)}, "variant ids must differ"),
        ({"files": ()}, r"'variants/a\.onnx' of a variant is not listed"),
        ({"name": "../net"}, "model '../net' must match"),
        ({"version": "1/2"}, "version '1/2' must match"),
        ({"device": "Host"}, "device 'Host' must match"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MANIFEST, **changes)


def test_what_a_value_refuses_a_reader_refuses_with_the_place() -> None:
    raw = to_bytes(MANIFEST).replace(b'"size_bytes":3', b'"size_bytes":-3')
    with pytest.raises(
        DocumentError, match=r"Manifest\.files\[0\]: variants/a\.onnx: size_bytes -3 is negative"
    ):
        from_bytes(Manifest, raw)


@pytest.mark.parametrize("digest", ["", DIGEST.upper(), DIGEST[:-1], DIGEST + "0"])
def test_a_digest_is_64_lower_case_digits(digest: str) -> None:
    with pytest.raises(ValueError, match="64 lower-case hexadecimal digits"):
        FileEntry("a", 1, digest)


def test_a_variant_runs_on_at_least_one_thread() -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, found 0"):
        replace(FLOAT, threads=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorSpec("x", (1, 3), "float8"), "dtype 'float8' is none of float32"),
        (lambda: TensorSpec("x", (0, 3), "float32"), "must be static and positive"),
        (lambda: TensorSpec("x", (1, 3), "float32", "NCHW"), "does not fit shape"),
        (lambda: Affine(0.0, 0), "scale must be positive"),
        (lambda: Affine(float("nan"), 0), "scale must be positive"),
    ],
)
def test_a_tensor_is_static_and_of_a_known_type(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
