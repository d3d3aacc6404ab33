# SPDX-License-Identifier: Apache-2.0
"""Modules beside the tests: `small_nets` is imported by its own name, the recorder's models are a fixture."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def recorder() -> ModuleType:
    path = Path(__file__).with_name("record_avx2.py")
    spec = importlib.util.spec_from_file_location("record_avx2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
