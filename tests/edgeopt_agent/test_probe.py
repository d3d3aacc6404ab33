# SPDX-License-Identifier: Apache-2.0
"""The probe against variants that behave, lie, crash, hang and leak: each in a real child process."""

import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from edgeopt_agent.probe import ProbeRequest, run_probe
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import StoreError
from edgeopt_wire.measurement import Measurement

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
DIGEST = "a" * 64
MIB = 2**20


def request(folder: Path, variant: str = "a", **changes: object) -> ProbeRequest:
    quick = {
        "warmup_ns": 1_000_000,
        "minimum_runs": 102,
        "minimum_ns": 3_000_000,
        "maximum_ns": 2_000_000_000,
    }
    return ProbeRequest(str(folder), variant, DIGEST, "device-1", "host", **{**quick, **changes})


def probe(folder: Path, variant: str = "a", *, timeout_s: float = 60.0, **changes: object) -> Measurement:
    return run_probe(request(folder, variant, **changes), timeout_s=timeout_s, clock=lambda: NOON)


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    ends_at = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends_at, "waited in vain"
        time.sleep(0.01)


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_variant_that_behaves_is_measured_with_its_conditions(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {"latency_ns": 200_000}})
    found = probe(tmp_path)
    assert found.error == ""
    assert (found.golden_ok, found.golden_exact, found.golden_sqnr_db) == (True, True, None)
    assert found.timing is not None
    assert found.timing.n >= 100
    assert found.timing.p99_ns is not None
    assert found.timing.min_ns >= 200_000
    assert found.timing.first_inference_ns >= 200_000
    assert found.timing.warmup >= 1
    assert found.peak_memory_bytes is not None
    assert found.peak_memory_bytes > 10 * MIB
    assert (found.package_sha256, found.device_id, found.device_class) == (DIGEST, "device-1", "host")
    assert (found.conditions.runtime, found.conditions.runtime_version) == ("null", "1.0")
    assert (found.conditions.threads, found.conditions.batch, found.conditions.accelerator) == (1, 1, "cpu")
    assert found.conditions.architecture
    assert found.measured_at == NOON
    assert from_bytes(Measurement, to_bytes(found)) == found


def test_declared_load_time_stands_apart_from_the_latency(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {"load_ns": 50_000_000}})
    timing = probe(tmp_path).timing
    assert timing is not None
    assert timing.load_ns >= 50_000_000
    assert timing.p50_ns < 50_000_000


def test_outputs_within_the_declared_ratio_are_good(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {"gain": 1.001}}, min_sqnr_db=55.0)
    found = probe(tmp_path)
    assert found.golden_ok
    assert not found.golden_exact
    assert found.golden_sqnr_db == pytest.approx(60.0, abs=0.1)  # 20 log10(1 / 0.001)


@pytest.mark.parametrize(
    ("model", "said"), [({"gain": 1.1}, "SQNR 20.0 dB"), ({"failure": "nan"}, "no numbers")]
)
def test_wrong_outputs_are_reported_never_hidden(
    tmp_path: Path, make_package, model: dict, said: str
) -> None:
    make_package(tmp_path, {"a": model})
    found = probe(tmp_path)
    assert not found.golden_ok
    assert not found.golden_exact
    assert any("golden" in warning and said in warning for warning in found.warnings)
    assert found.timing is not None


def test_a_later_golden_sample_that_is_wrong_is_found(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {"failure": "wrong", "fail_after": 2}})
    assert not probe(tmp_path).golden_ok


def test_variant_without_golden_outputs_is_measured_but_not_good(
    tmp_path: Path, make_package, rewrite_package
) -> None:
    rewrite_package(tmp_path, make_package(tmp_path, {"a": {}}), golden="")
    found = probe(tmp_path)
    assert found.timing is not None
    assert not found.golden_ok


@pytest.mark.parametrize(
    ("failure", "word", "said"),
    [
        ("abort", "crash", "SIGABRT"),
        ("segfault", "crash", "SIGSEGV"),
        ("exit", "crash", "status 7"),
        ("raise", "runtime", "fails on purpose"),
    ],
)
@pytest.mark.parametrize("fail_after", [-1, 0, 5], ids=["loading", "first-run", "later"])
def test_crash_at_any_time_becomes_an_error(
    tmp_path: Path, make_package, failure: str, word: str, said: str, fail_after: int
) -> None:
    make_package(tmp_path, {"a": {"failure": failure, "fail_after": fail_after}})
    found = probe(tmp_path)
    assert said in found.error
    assert found.extra["failure"] == word
    assert found.timing is None
    assert not found.golden_ok
    assert (found.model, found.variant, found.precision) == ("tiny", "a", "fp32")
    assert found.measured_at == NOON


def test_hang_is_ended_when_the_time_is_over(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {"failure": "hang"}})
    found = probe(tmp_path, timeout_s=1.5)
    assert found.error.startswith("no answer within 1.5 s")
    assert found.extra["failure"] == "timeout"


def test_what_a_hanging_child_started_is_ended_too(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {}})
    script = (
        "import os, subprocess, sys, time, pathlib\n"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(grandchild.pid))\n"
        "time.sleep(600)\n"
    )
    run_probe(request(tmp_path), timeout_s=1.5, clock=lambda: NOON, command=[sys.executable, "-c", script])
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    wait_until(
        lambda: not status.exists() or "State:\tZ" in status.read_text()
    )  # a killed process dies when it runs


def test_child_does_not_outlive_an_agent_that_is_killed(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {"failure": "hang"}})
    script = (
        "from edgeopt_agent.probe import ProbeRequest, run_probe\n"
        f"run_probe(ProbeRequest({str(tmp_path)!r}, 'a', {DIGEST!r}, 'device-1', 'host'))\n"
    )
    agent = subprocess.Popen([sys.executable, "-c", script])
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    if not children.exists():
        pytest.skip("this kernel lists no children (CONFIG_PROC_CHILDREN)")
    try:
        wait_until(lambda: "probe" in command_line(children.read_text().strip()))
        child = children.read_text().strip()
        wait_until(lambda: "numpy" in Path(f"/proc/{child}/maps").read_text())  # it is in main by now
    finally:
        agent.kill()
        agent.wait()
    wait_until(lambda: not command_line(child))


def test_leak_stops_at_the_memory_limit(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {"failure": "leak", "fail_after": 1}})
    found = run_probe(request(tmp_path), timeout_s=60.0, memory_limit_bytes=1024 * MIB, clock=lambda: NOON)
    assert found.error
    assert found.extra["failure"] == "memory"


def test_enough_memory_under_the_limit_changes_nothing(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {}})
    found = run_probe(request(tmp_path), timeout_s=60.0, memory_limit_bytes=4096 * MIB, clock=lambda: NOON)
    assert found.error == ""


def test_library_that_talks_on_standard_output_does_not_spoil_the_answer(
    tmp_path: Path, make_package
) -> None:
    make_package(tmp_path, {"a": {"failure": "chatter"}})
    found = probe(tmp_path)
    assert found.error == ""
    assert found.golden_ok


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("print('hello')", "wrote no measurement"),
        ("print('{}')", "expected schema"),
        ("pass", "wrote no measurement"),
        ("print('x' * 3_000_000)", "more than 1048576 bytes"),
    ],
)
def test_child_that_answers_something_else_is_an_error(
    tmp_path: Path, make_package, script: str, said: str
) -> None:
    make_package(tmp_path, {"a": {}})
    found = run_probe(
        request(tmp_path), timeout_s=60.0, clock=lambda: NOON, command=[sys.executable, "-c", script]
    )
    assert said in found.error
    assert found.extra["failure"] == "answer"


def test_what_a_crashing_child_last_said_stands_in_the_error(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {}})
    script = "import os, sys; print('x' * 100_000, 'cannot find /dev/apex_0', file=sys.stderr, flush=True); os.abort()"
    found = run_probe(
        request(tmp_path), timeout_s=60.0, clock=lambda: NOON, command=[sys.executable, "-c", script]
    )
    assert found.error.endswith("cannot find /dev/apex_0")
    assert len(found.error) < 1000


def test_program_that_is_not_there_is_an_error(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {}})
    found = run_probe(request(tmp_path), clock=lambda: NOON, command=["/no/such/python"])
    assert "could not be started" in found.error


@pytest.mark.parametrize(
    ("change", "word", "said"),
    [
        ({"accelerator": "gpu"}, "unsupported", "asks for the accelerator 'gpu'"),
        ({"runtime": "onnxrt"}, "unsupported", "unknown runtime 'onnxrt'"),
        ({"minimum_runtime": "7"}, "unsupported", "needs null 7 or newer"),
        ({"golden": "golden/outputs/lost"}, "package", "cannot read the golden sample"),
        ({"golden": "../../etc"}, "package", "not a safe path"),
    ],
)
def test_what_the_machine_cannot_run_is_said(
    tmp_path: Path, make_package, rewrite_package, change: dict, word: str, said: str
) -> None:
    rewrite_package(tmp_path, make_package(tmp_path, {"a": {}}), **change)
    found = probe(tmp_path)
    assert said in found.error
    assert found.extra["failure"] == word


def test_unknown_variant_lists_the_known_ones(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"fp32-t1": {}})
    found = probe(tmp_path, "fp32-t2")
    assert "did you mean 'fp32-t1'" in found.error


def test_damaged_golden_sample_is_an_error(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {}})
    (tmp_path / "golden/inputs/0.npy").write_bytes(b"\x93NUMPY garbage")
    assert "damaged" in probe(tmp_path).error


def test_golden_sample_of_another_shape_is_an_error(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {}}, golden_outputs=np.zeros((3, 5), np.float32))
    assert "expected samples of shape (1, 4)" in probe(tmp_path).error


def test_missing_folder_is_the_one_exception(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no package"):
        probe(tmp_path / "nowhere")


def test_stand_in_says_so_on_every_measurement(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {}})
    found = probe(tmp_path, stand_in_for="raspberry-pi-4")
    assert found.conditions.stand_in_for == "raspberry-pi-4"
    assert any("stands in for raspberry-pi-4" in warning for warning in found.warnings)


def test_slow_variant_stops_at_its_time_and_has_no_p99(tmp_path: Path, make_package) -> None:
    make_package(tmp_path, {"a": {"latency_ns": 20_000_000}})
    found = probe(tmp_path, minimum_runs=1000, maximum_ns=300_000_000)
    assert found.timing is not None
    assert found.timing.n < 64
    assert found.timing.p99_ns is None
    assert not found.stable
    assert any("a p90 needs 64" in warning for warning in found.warnings)
