# SPDX-License-Identifier: Apache-2.0
"""The recorder's models as fixtures, because tests of one folder cannot import each other."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def recorder() -> ModuleType:
    path = Path(__file__).with_name("record_avx2.py")
    spec = importlib.util.spec_from_file_location("record_avx2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
