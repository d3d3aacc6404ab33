# SPDX-License-Identifier: Apache-2.0
"""What does not fit a machine is refused from its signed index alone, and says what is missing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeopt_agent.config import AgentConfig
from edgeopt_agent.fits import Machine, check_fits, installed_runtimes, this_machine
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import DocumentError, UnsupportedError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.manifest import Compatible

CONFIG = AgentConfig("d1", "pi5", "/tmp/state", "/tmp/root.json", {"kind": "folder"})
PI5 = Machine("aarch64", 2048, 10**9, lambda names: {n: v for n, v in HAS.items() if n in names})
HAS = {"onnxruntime": "1.22.1", "litert": "2.1.0"}
FITS = Compatible(("pi5",), ("aarch64",), 512, 10**8, {"runtimes": {"onnxruntime": "1.20"}})


def index(compatible: Compatible) -> PackageIndex:
    return PackageIndex("net", "1", "pi5", compatible, 1000, "0" * 64, 65536, ("1" * 64,))


def refusal(compatible: Compatible, machine: Machine = PI5, config: AgentConfig = CONFIG) -> str:
    with pytest.raises(UnsupportedError) as caught:
        check_fits(index(compatible), config, machine)
    return str(caught.value)


def test_package_that_fits_is_not_refused() -> None:
    check_fits(index(FITS), CONFIG, PI5)
    check_fits(index(Compatible(("pi5",))), CONFIG, PI5)
    check_fits(index(replace(FITS, memory_mib=2048, disk_bytes=10**9)), CONFIG, PI5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory_mib": 2049}, "needs 2049 MiB of memory, this machine has 2048 MiB"),
        ({"disk_bytes": 2 * 10**9}, "needs 2000.0 MB of disk, this one holds 1000.0 MB"),
        ({"architectures": ("x86_64",)}, "built for x86_64, this machine is aarch64"),
        (
            {"extra": {"runtimes": {"onnxruntime": "1.23"}}},
            "runs in onnxruntime 1.23, .*has onnxruntime 1.22.1",
        ),
        ({"extra": {"runtimes": {"onnxruntime": "2"}}}, "runs in onnxruntime 2"),
        ({"extra": {"runtimes": {"openvino": ""}}}, "runs in openvino, this machine has none of them"),
    ],
)
def test_what_is_missing_is_said_and_nothing_is_fetched(changes: dict[str, Any], said: str) -> None:
    import re

    text = refusal(replace(FITS, **changes))
    assert re.search(said, text)
    assert text.endswith("nothing was fetched")


def test_one_runtime_of_several_is_enough() -> None:
    check_fits(index(replace(FITS, extra={"runtimes": {"executorch": "1.5", "litert": "2.1"}})), CONFIG, PI5)


def test_memory_that_cannot_be_told_refuses_nothing() -> None:
    check_fits(index(replace(FITS, memory_mib=10**6)), CONFIG, replace(PI5, memory_mib=None))


def test_stand_in_skips_the_architecture_and_nothing_else() -> None:
    config = replace(CONFIG, stand_in=True)
    check_fits(index(replace(FITS, architectures=("riscv64",))), config, PI5)
    assert "of memory" in refusal(replace(FITS, memory_mib=9999), config=config)


def test_limit_of_the_control_group_counts_where_it_is_lower(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal:        8257536 kB\nMemFree: 5 kB\n")
    assert this_machine(tmp_path, tmp_path).memory_mib == 8064
    write("proc/self/cgroup", "0::/system.slice/agent.service\n")
    write("sys/fs/cgroup/system.slice/agent.service/memory.max", "max\n")
    assert this_machine(tmp_path, tmp_path).memory_mib == 8064
    write("sys/fs/cgroup/system.slice/memory.max", f"{300 * 2**20}\n")
    assert this_machine(tmp_path, tmp_path).memory_mib == 300
    assert this_machine(tmp_path, tmp_path / "nothing").memory_mib is None


def test_runtimes_of_this_machine_are_asked_outside_of_this_process() -> None:
    import importlib.metadata

    found = installed_runtimes(("no-such-runtime", "null", "onnxruntime"))
    assert set(found) == {"null", "onnxruntime"}
    assert found["onnxruntime"] == importlib.metadata.version("onnxruntime")


def test_runtimes_of_an_index_are_read_and_checked() -> None:
    read = from_bytes(PackageIndex, to_bytes(index(FITS)))
    assert read.compatible.runtimes == {"onnxruntime": "1.20"}
    with pytest.raises(DocumentError, match="runtimes"):
        from_bytes(PackageIndex, to_bytes(index(FITS)).replace(b'"1.20"', b"120"))


def test_runtimes_that_cannot_be_asked_refuse_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert installed_runtimes(("litert", "executorch")) is None
    check_fits(
        index(replace(FITS, extra={"runtimes": {"openvino": ""}})),
        CONFIG,
        replace(PI5, versions=installed_runtimes),
    )
