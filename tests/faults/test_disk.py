# SPDX-License-Identifier: Apache-2.0
"""The disk model says of small histories what POSIX says."""

from pathlib import Path

from disk import LEFT, Disk, cuts, write_image


def _left(folder: Path, *operations: tuple[object, ...]) -> dict[str, dict[str, object]]:
    disk = Disk(folder)
    for operation in operations:
        disk.apply(operation)
    return {left: dict(disk.image(left)) for left in LEFT}


def test_what_was_flushed_with_its_name_stays_in_every_image(tmp_path: Path) -> None:
    found = _left(
        tmp_path, ("create", "/a", 1), ("write", 1, 0, b"1234"), ("flush", 1), ("flush_folder", "/")
    )
    assert all(image == {"a": b"1234"} for image in found.values())


def test_a_rename_before_the_flush_can_leave_an_empty_or_a_torn_file_or_both_names(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    made = ("create", "/new", 1), ("write", 1, 0, b"1234"), ("rename", "/new", "/old")
    found = _left(tmp_path, *made)
    assert found["flushed"] == {"old": b"old"}
    assert found["names"] == {"old": b""}
    assert found["torn"] == {"old": b"12\0\0"}
    assert found["all"] == {"old": b"1234"}
    late = _left(tmp_path, ("create", "/new", 1), ("flush_folder", "/"), *made[1:])
    assert late["contents"] == {"new": b"1234", "old": b"old"}


def test_a_folder_that_was_not_flushed_takes_its_content_with_it(tmp_path: Path) -> None:
    inner = ("create", "/f/a", 1), ("flush", 1), ("flush_folder", "/f")
    assert _left(tmp_path, ("mkdir", "/f"), *inner)["flushed"] == {}
    kept = _left(tmp_path, ("mkdir", "/f"), *inner, ("flush_folder", "/"))
    assert kept["flushed"] == {"f": None, "f/a": b""}


def test_removed_names_come_back_until_their_folder_is_flushed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to("a")
    assert _left(tmp_path, ("remove", "/a"))["flushed"] == {"a": b"x", "link": "a"}
    assert _left(tmp_path, ("remove", "/a"), ("flush_folder", "/"))["flushed"] == {"link": "a"}


def test_images_are_laid_out_as_they_say_and_none_comes_twice(tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.mkdir()
    operations = [("mkdir", "/f"), ("create", "/f/a", 1), ("write", 1, 2, b"zz"), ("truncate", 1, 3)]
    images = list(cuts(before, operations))
    assert len({image for _, _, image in images}) == len(images) == 7
    write_image(images[-1][2], tmp_path / "after")
    assert (tmp_path / "after/f/a").read_bytes() in (b"\0\0z", b"\0\0\0", b"\0\0")
