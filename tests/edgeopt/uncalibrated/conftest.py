# SPDX-License-Identifier: Apache-2.0
"""The net of `digit_net.py` as a module, trained once a session."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def digit_net() -> ModuleType:
    pytest.importorskip("sklearn")
    pytest.importorskip("torch")
    path = Path(__file__).with_name("digit_net.py")
    spec = importlib.util.spec_from_file_location("digit_net", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["digit_net"] = module
    spec.loader.exec_module(module)
    return module
