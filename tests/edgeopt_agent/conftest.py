# SPDX-License-Identifier: Apache-2.0
"""Fixtures that make packages of null models and repositories of them; see `tests/publishing.py`."""

from collections.abc import Callable
from pathlib import Path

import pytest
from publishing import Publisher, rewrite, write_package

from edgeopt_wire.manifest import Manifest

MakePackage = Callable[..., Manifest]


@pytest.fixture
def make_package() -> MakePackage:
    return write_package


@pytest.fixture
def rewrite_package() -> MakePackage:
    return rewrite


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "publisher")


@pytest.fixture
def make_publisher() -> type[Publisher]:
    return Publisher
