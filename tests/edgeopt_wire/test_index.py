# SPDX-License-Identifier: Apache-2.0
"""The index tells every chunk of a package; one that does not add up is refused before a byte is pulled."""

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pytest

from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.index import CHUNK_BYTES, PackageIndex, index_of, target_path
from edgeopt_wire.manifest import Compatible

HOST = Compatible(("host",))


def make(tmp_path: Path, size: int, chunk_bytes: int = 1024) -> tuple[bytes, PackageIndex]:
    content = random.Random(size).randbytes(size)
    path = tmp_path / "p.edgeopt"
    path.write_bytes(content)
    index = index_of(path, name="net", version="1", device="host", compatible=HOST, chunk_bytes=chunk_bytes)
    return content, index


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 5000])
def test_the_chunks_put_together_are_the_file(tmp_path: Path, size: int) -> None:
    content, index = make(tmp_path, size)
    start = 0
    for number, digest in enumerate(index.chunks):
        piece = content[start : start + index.chunk_length(number)]
        assert hashlib.sha256(piece).hexdigest() == digest
        start += index.chunk_length(number)
    assert start == size == index.size_bytes
    assert index.sha256 == hashlib.sha256(content).hexdigest()
    assert from_bytes(PackageIndex, to_bytes(index)) == index


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_bytes": 1024}, "1024 bytes do not make 2 chunks"),
        ({"size_bytes": 0}, "size_bytes must be positive"),
        ({"chunk_bytes": 0}, "1 KiB to 1 MiB"),
        ({"chunk_bytes": 2**21}, "1 KiB to 1 MiB"),
        ({"chunks": ()}, "do not make 0 chunks"),
        ({"chunks": ("x", "y")}, "64 lower-case hexadecimal"),
        ({"sha256": "x"}, "64 lower-case hexadecimal"),
        ({"name": "a/b"}, "model 'a/b' must match"),
    ],
)
def test_an_index_that_does_not_add_up_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    _, index = make(tmp_path, 2000)
    with pytest.raises(ValueError, match=message):
        replace(index, **changes)


def test_an_empty_file_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size_bytes must be positive"):
        make(tmp_path, 0)


def test_a_chunk_fits_the_smallest_payload_limit_in_the_field() -> None:
    assert CHUNK_BYTES <= 128_000


def test_every_model_version_and_device_has_its_own_target() -> None:
    assert target_path("net", "1", "host") == "models/net/1/host.json"
