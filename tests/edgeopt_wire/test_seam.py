# SPDX-License-Identifier: Apache-2.0
"""The folder is the registry: nothing is listed, nothing is imported early, unknown names get a way out."""

import sys
from pathlib import Path

import pytest

from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "seamtest" / "gadgets"
    folder.mkdir(parents=True)
    (tmp_path / "seamtest" / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    (folder / "drill.py").write_text("NAME = 'drill'\n")
    (folder / "saw.py").write_text("raise RuntimeError('imported too early')\n")
    (folder / "_private.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "seamtest.gadgets"
    for name in [name for name in sys.modules if name.startswith("seamtest")]:
        del sys.modules[name]


def test_plug_ins_are_the_public_modules_of_the_folder_and_listing_imports_none(package: str) -> None:
    assert seam.names(package) == ("drill", "saw")
    assert "seamtest.gadgets.saw" not in sys.modules


def test_loading_a_plug_in_imports_it_alone(package: str) -> None:
    assert seam.load(package, "drill").NAME == "drill"
    assert "seamtest.gadgets.saw" not in sys.modules


def test_a_new_file_is_a_new_plug_in(package: str, tmp_path: Path) -> None:
    (tmp_path / "seamtest" / "gadgets" / "laser.py").write_text("NAME = 'laser'\n")
    assert "laser" in seam.names(package)
    assert seam.load(package, "laser").NAME == "laser"


def test_a_third_party_adds_a_plug_in_by_an_entry_point(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    info = outside / "thirdparty-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[edgeopt.gadgets]\nlathe = seamtest_lathe\n")
    (outside / "seamtest_lathe.py").write_text("NAME = 'lathe'\n")
    monkeypatch.syspath_prepend(str(outside))
    assert seam.names(package) == ("drill", "lathe", "saw")
    assert seam.load(package, "lathe").NAME == "lathe"


@pytest.mark.parametrize("name", ["dril", "_private", "drill.x", "../drill", ""])
def test_an_unknown_name_is_refused_with_all_known_ones(package: str, name: str) -> None:
    with pytest.raises(RecipeError, match=r"unknown gadget .* Known: drill, saw$"):
        seam.load(package, name)


def test_the_nearest_name_comes_first() -> None:
    text = seam.unknown("device", "rasberry-pi-5", ["host", "raspberry-pi-5", "coral-usb"])
    assert text == (
        "unknown device 'rasberry-pi-5'; did you mean 'raspberry-pi-5'? Known: coral-usb, host, raspberry-pi-5"
    )


def test_without_a_near_name_the_known_ones_stand_in_a_sentence_of_their_own() -> None:
    assert seam.unknown("scheme", "s8s9", []) == "unknown scheme 's8s9'. Known: none"
    assert seam.unknown("device", "zzz", ["host"]) == "unknown device 'zzz'. Known: host"
