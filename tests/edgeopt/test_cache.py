# SPDX-License-Identifier: Apache-2.0
"""A cached stage is whole or not there."""

import os
from pathlib import Path

import pytest

from edgeopt.cache import ABANDONED_AFTER_S, Cache
from edgeopt_wire.errors import StoreError


def _hello(folder: Path) -> None:
    (folder / "file").write_text("hello")


def test_a_stage_is_made_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first, was_there = cache.stage({"a": 1}, _hello, tmp_path)
    again, is_there = cache.stage({"a": 1}, _hello, tmp_path)
    assert (was_there, is_there) == (False, True)
    assert first == again
    assert (again / "file").read_text() == "hello"


def test_another_key_is_another_stage(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.stage({"a": 1}, _hello, tmp_path)[0] != cache.stage({"a": 2}, _hello, tmp_path)[0]


def test_an_interrupted_stage_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")

    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.stage({"a": 1}, interrupted, tmp_path)
    assert list((tmp_path / "cache" / "v1").iterdir()) == []


def test_without_a_folder_nothing_outlives_the_scratch(tmp_path: Path) -> None:
    entry, _ = Cache(None).stage({"a": 1}, _hello, tmp_path / "scratch")
    assert entry.is_relative_to(tmp_path / "scratch")


def test_what_a_killed_build_left_is_swept_after_a_day(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    old, young = tmp_path / "v1" / ".half-old", tmp_path / "v1" / ".half-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (1000, 1000))
    os.utime(young, (1000 + ABANDONED_AFTER_S, 1000 + ABANDONED_AFTER_S))
    cache.sweep(now=1000 + ABANDONED_AFTER_S + 1)
    assert [folder.exists() for folder in (old, young)] == [False, True]


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--no-cache"):
        Cache(tmp_path / "file").stage({"a": 1}, _hello, tmp_path)
