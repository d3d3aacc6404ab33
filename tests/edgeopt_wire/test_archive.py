# SPDX-License-Identifier: Apache-2.0
"""The package file: same files, same bytes; large members on a page; anything hostile or damaged is refused."""

import hashlib
import io
import random
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from edgeopt_wire.archive import MAX_MEMBERS, PAGE_BYTES, PackageReader, safe_path, write_archive
from edgeopt_wire.document import to_bytes
from edgeopt_wire.errors import DocumentError, StoreError
from edgeopt_wire.manifest import MANIFEST_PATH, Compatible, FileEntry, Manifest, Provenance, Variant
from edgeopt_wire.tensor import TensorSpec

TENSOR = TensorSpec("x", (1, 2), "float32")
SMALL = {
    "variants/a.bin": random.Random(1).randbytes(70_000),
    "golden/inputs/0.npy": random.Random(2).randbytes(600),
    "labels.txt": b"cat\ndog\n",
}


def manifest(contents: Mapping[str, bytes]) -> Manifest:
    files = tuple(
        FileEntry(path, len(raw), hashlib.sha256(raw).hexdigest()) for path, raw in sorted(contents.items())
    )
    variant = Variant("a", "null", "fp32", "variants/a.bin", (TENSOR,), (TENSOR,), "golden/outputs/a", 40.0)
    return Manifest(
        "net", "1", "host", Compatible(("host",)), (TENSOR,), (TENSOR,), (variant,), files, "golden/inputs", {},
        Provenance("0" * 64, "0" * 64),
    )  # fmt: skip


def members(contents: Mapping[str, bytes] = SMALL) -> dict[str, bytes]:
    return {MANIFEST_PATH: to_bytes(manifest(contents)), **contents}


def package_bytes(contents: Mapping[str, bytes] = SMALL) -> bytes:
    target = io.BytesIO()
    write_archive(target, members(contents))
    return target.getvalue()


def write(tmp_path: Path, raw: bytes) -> Path:
    path = tmp_path / "p.edgeopt"
    path.write_bytes(raw)
    return path


def hostile(tmp_path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    path = tmp_path / "hostile.edgeopt"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore", UserWarning)  # zipfile warns of a name that stands twice
        for name, raw in entries:
            archive.writestr(zipfile.ZipInfo(name), raw, compress_type=compression)
    return path


def refused(path: Path) -> bool:
    """Whether opening or verifying refuses the file with our own error."""
    try:
        with PackageReader(path) as package:
            package.verify()
    except DocumentError:
        return True
    return False


def test_the_same_files_give_the_same_bytes_in_any_order() -> None:
    backwards = dict(reversed(list(SMALL.items())))
    assert package_bytes(SMALL) == package_bytes(backwards)


def test_bytes_and_files_on_disk_give_the_same_package(tmp_path: Path) -> None:
    source = tmp_path / "a.bin"
    source.write_bytes(SMALL["variants/a.bin"])
    target = io.BytesIO()
    write_archive(target, {**members(), "variants/a.bin": source})
    assert target.getvalue() == package_bytes()


def test_everything_comes_back_checked(tmp_path: Path) -> None:
    path = write(tmp_path, package_bytes())
    with PackageReader(path) as package:
        assert package.manifest == manifest(SMALL)
        assert {name: package.read(name) for name in SMALL} == SMALL
        assert package.verify() == hashlib.sha256(path.read_bytes()).hexdigest()
        package.extract(tmp_path / "slot")
    found = {
        p.relative_to(tmp_path / "slot").as_posix(): p.read_bytes() for p in (tmp_path / "slot").rglob("*.*")
    }
    assert found == members()


def test_only_what_is_asked_for_is_extracted(tmp_path: Path) -> None:
    with PackageReader(write(tmp_path, package_bytes())) as package:
        package.extract(tmp_path / "slot", "golden/")
    assert (tmp_path / "slot/golden/inputs/0.npy").is_file()
    assert (tmp_path / "slot" / MANIFEST_PATH).is_file()
    assert not (tmp_path / "slot/variants").exists()


@pytest.mark.parametrize("size", [64 * 1024, 64 * 1024 + 1, 200_000])
@pytest.mark.parametrize("before", [0, 1, 4095, 4096, 10_001])
def test_a_large_member_starts_on_a_page(tmp_path: Path, size: int, before: int) -> None:
    contents = {"labels.txt": b"x" * before, "variants/a.bin": random.Random(size).randbytes(size)}
    raw = package_bytes(contents)
    assert raw.index(contents["variants/a.bin"]) % PAGE_BYTES == 0
    assert not refused(write(tmp_path, raw))


def test_any_zip_tool_can_read_a_package() -> None:
    with zipfile.ZipFile(io.BytesIO(package_bytes())) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == MANIFEST_PATH
        assert {name: archive.read(name) for name in SMALL} == SMALL


def test_a_flipped_bit_anywhere_is_refused(tmp_path: Path) -> None:
    """Every byte of the headers and the directory, and 300 seeded positions elsewhere."""
    contents = {"variants/a.bin": random.Random(3).randbytes(66_000), "labels.txt": b"cat"}
    raw = package_bytes(contents)
    random_ = random.Random(11)
    payload = raw.index(contents["variants/a.bin"])
    directory = raw.index(b"PK\x01\x02")
    first_headers = range(60)
    places = {
        *first_headers,
        *range(directory, len(raw)),
        *random_.sample(range(len(raw)), 250),
        *random_.sample(range(len(members(contents)[MANIFEST_PATH]), payload), 50),
    }
    for place in sorted(places):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << random_.randrange(8)
        assert refused(write(tmp_path, bytes(damaged))), (
            f"a flipped bit at byte {place} of {len(raw)} went through"
        )


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    raw = package_bytes()
    for length in [0, 1, 22, *random.Random(5).sample(range(len(raw)), 60), len(raw) - 1]:
        assert refused(write(tmp_path, raw[:length])), length


@pytest.mark.parametrize("extra", [b"\0", b"PK\x05\x06" + bytes(18), b"x" * 5000])
def test_bytes_put_before_or_after_a_package_are_refused(tmp_path: Path, extra: bytes) -> None:
    assert refused(write(tmp_path, package_bytes() + extra))
    assert refused(write(tmp_path, extra + package_bytes()))


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "a/../../evil",
        "a//b",
        "./a",
        "a/",
        "",
        "a\\b",
        "C:evil",
        "a\nb",
        "é",
        "a b",
        "x" * 201,
    ],
)
def test_an_unsafe_name_is_neither_written_nor_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(DocumentError, match="not a safe path"):
        safe_path(name)
    with pytest.raises(DocumentError, match="not a safe path"):
        write_archive(io.BytesIO(), {**members(), name: b""})
    path = hostile(tmp_path, [*members().items(), (name, b"x")])
    with pytest.raises(DocumentError, match="not a safe path"):
        PackageReader(path)


def test_an_unsafe_name_in_the_manifest_is_refused(tmp_path: Path) -> None:
    listed = to_bytes(manifest({**SMALL, "../evil": b"x"}))
    path = hostile(tmp_path, [(MANIFEST_PATH, listed), *SMALL.items()])
    with pytest.raises(DocumentError, match=r"'\.\./evil' is not a safe path"):
        PackageReader(path)


def test_a_member_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = hostile(tmp_path, [*members().items(), ("labels.txt", SMALL["labels.txt"])])
    with pytest.raises(DocumentError, match=r"'labels\.txt' stands twice"):
        PackageReader(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_member_is_refused_before_it_is_unpacked(tmp_path: Path, compression: int) -> None:
    bomb = {**SMALL, "labels.txt": bytes(10**7)}
    path = hostile(tmp_path, list(members(bomb).items()), compression)
    with pytest.raises(DocumentError, match="compressed or encrypted"):
        PackageReader(path)


def test_members_that_claim_more_bytes_than_the_file_has_are_refused(tmp_path: Path) -> None:
    raw = bytearray(package_bytes())
    entry = raw.index(b"PK\x01\x02")
    struct.pack_into("<II", raw, entry + 20, 2**31, 2**31)
    with pytest.raises(DocumentError, match="claim more bytes than the file has"):
        PackageReader(write(tmp_path, bytes(raw)))


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    raw = bytearray(package_bytes())
    first = raw.index(b"PK\x01\x02")
    second = raw.index(b"PK\x01\x02", first + 4)
    raw[second + 42 : second + 46] = raw[first + 42 : first + 46]
    assert refused(write(tmp_path, bytes(raw)))


@pytest.mark.parametrize(
    ("listed", "found", "odd"),
    [
        ({**SMALL, "gone.txt": b"x"}, SMALL, "gone.txt"),
        (SMALL, {**SMALL, "stowaway.txt": b"x"}, "stowaway.txt"),
        (SMALL, {**SMALL, "labels.txt": b"longer than it was\n"}, "labels.txt"),
    ],
    ids=["missing", "unlisted", "another size"],
)
def test_a_manifest_that_does_not_match_the_content_is_refused(
    tmp_path: Path, listed: dict[str, bytes], found: dict[str, bytes], odd: str
) -> None:
    target = io.BytesIO()
    write_archive(target, {MANIFEST_PATH: to_bytes(manifest(listed)), **found})
    with pytest.raises(DocumentError, match=f"the manifest and the content differ at '{odd}'"):
        PackageReader(write(tmp_path, target.getvalue()))


def test_content_of_another_digest_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = io.BytesIO()
    write_archive(target, {MANIFEST_PATH: to_bytes(manifest(SMALL)), **SMALL, "labels.txt": b"dog\ncat\n"})
    with PackageReader(write(tmp_path, target.getvalue())) as package:
        for act in (
            package.verify,
            lambda: package.read("labels.txt"),
            lambda: package.extract(tmp_path / "slot"),
        ):
            with pytest.raises(DocumentError, match=r"labels\.txt does not match its digest"):
                act()
    assert not (tmp_path / "slot" / "labels.txt").exists()


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    contents = {**SMALL, **{f"f{i}": b"" for i in range(MAX_MEMBERS)}}
    with pytest.raises(DocumentError, match="at most 1000 are allowed"):
        PackageReader(write(tmp_path, package_bytes(contents)))


def test_a_package_has_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"a package needs manifest\.json"):
        write_archive(io.BytesIO(), SMALL)
    with pytest.raises(DocumentError, match=r"it has no manifest\.json"):
        PackageReader(hostile(tmp_path, list(SMALL.items())))


def test_a_file_that_is_not_there_is_the_disks_fault(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot open .*nothing"):
        PackageReader(tmp_path / "nothing.edgeopt")


def test_a_file_that_the_package_does_not_list_cannot_be_read(tmp_path: Path) -> None:
    with (
        PackageReader(write(tmp_path, package_bytes())) as package,
        pytest.raises(DocumentError, match="holds no"),
    ):
        package.read("other.txt")
