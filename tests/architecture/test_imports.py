# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and what an import may cost. Each question is asked in a fresh process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
HEAVY = ["numpy", "torch", "onnx", "onnxruntime", "tuf", "click", "matplotlib", "sqlalchemy", "fastapi"]
IMPORT_LIMIT_S = 0.4
"""What `import edgeopt` may take: a command line that a person waits for should answer within half a second."""


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = (
        f"import json, sys\n{code}\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_every_import_goes_one_way() -> None:
    tool = SCRIPTS / "lint-imports"
    done = subprocess.run(
        [tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wire_needs_nothing_but_the_standard_library() -> None:
    code = """
import pkgutil, importlib, edgeopt_wire
for module in pkgutil.iter_modules(edgeopt_wire.__path__):
    importlib.import_module('edgeopt_wire.' + module.name)
"""
    # what a bare interpreter holds is not the wire's doing: .pth files of the environment may load more
    new = loaded_after(code) - loaded_after("") - {"edgeopt_wire"}
    assert new <= set(sys.stdlib_module_names)


def test_no_module_of_the_agent_loads_an_inference_library() -> None:
    code = """
import pkgutil, importlib, edgeopt_agent
found = [m.name for m in pkgutil.walk_packages(edgeopt_agent.__path__, 'edgeopt_agent.')]
assert len(found) > 15, found
for name in found:
    importlib.import_module(name)
"""
    loaded = loaded_after(code)
    assert not loaded & {"numpy", "torch", "onnx", "onnxruntime", "ai_edge_litert", "PIL", "click", "edgeopt"}


def test_importing_edgeopt_loads_no_framework() -> None:
    assert not loaded_after("import edgeopt") & set(HEAVY)


def test_importing_edgeopt_is_quick() -> None:
    # processor time: a machine that is busy with other tests says nothing about an import
    code = "import time; start = time.process_time(); import edgeopt; print(time.process_time() - start)"
    times = [
        float(
            subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout
        )
        for _ in range(5)
    ]
    assert min(times) < IMPORT_LIMIT_S, times


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["fleet", "--help"], ["--version"]])
def test_help_loads_no_framework(arguments: list[str]) -> None:
    code = f"""
from edgeopt.cli import main
sys.argv = ['edgeopt', *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert not loaded_after(code) & (set(HEAVY) - {"click"})


def test_the_agents_help_loads_no_more_than_the_standard_library_and_itself() -> None:
    code = """
from edgeopt_agent.cli import main
sys.argv = ['edgeopt-agent', '--help']
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    new = loaded_after(code) - loaded_after("") - {"edgeopt_wire", "edgeopt_agent"}
    assert new <= set(sys.stdlib_module_names)


def test_importing_any_module_does_no_work(tmp_path: Path) -> None:
    """An import writes no file, starts no thread and says nothing."""
    code = """
import importlib, io, contextlib, pkgutil, threading
import edgeopt, edgeopt_agent, edgeopt_profiles, edgeopt_converters, edgeopt.cli
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    for package in (edgeopt_agent, edgeopt_profiles, edgeopt_converters, edgeopt.cli):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):
            importlib.import_module(module.name)
assert not said.getvalue(), said.getvalue()
assert threading.active_count() == 1, threading.enumerate()
"""
    subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert not list(tmp_path.iterdir())


def test_the_command_is_installed() -> None:
    assert shutil.which("edgeopt", path=str(SCRIPTS))
    assert shutil.which("edgeopt-agent", path=str(SCRIPTS))
