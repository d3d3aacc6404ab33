# SPDX-License-Identifier: Apache-2.0
"""What an agent costs that serves one model and is asked nothing; and how long a device takes from power to an answer.

    python tests/benchmarks/serve_idle.py --model FILE.onnx [--seconds 20] [--starts 5] [--json]

FILE.onnx is the int8 EfficientNet-Lite0 (float32 or uint8 in, NCHW) that `edgeopt build` makes. The agent is the real
process, `edgeopt-agent run` with a folder as its repository, so its loop runs too; `--command serve` takes the loop away.
Resident memory is VmRSS after the first answers, CPU is what the kernel counted while nothing was asked. Ends with 3
where a promise is not kept.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgeopt.keys import create_keys
from edgeopt.package import file_entries, write_package
from edgeopt.publish import publish
from edgeopt_agent.client import Client
from edgeopt_wire.manifest import Compatible, Manifest, Provenance, Variant
from edgeopt_wire.tensor import TensorSpec

MAX_RSS_MB, MAX_CPU, MAX_FIRST_S = 120.0, 0.005, 2.0
"""The promises: resident memory, share of one core while idle, process start to the first answer."""

COMMAND = [sys.executable, "-c", "from edgeopt_agent.cli import main; main()"]


def make_package(model: Path, folder: Path) -> Path:
    """Package one ONNX file with a golden sample of its own."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    edge, out = session.get_inputs()[0], session.get_outputs()[0]
    dtype = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}[edge.type]
    sample = np.random.default_rng(0).integers(0, 255, [2, *edge.shape[1:]]).astype(dtype)
    if dtype == "float32":
        sample = ((sample / 255 - 0.498) / 0.502).astype(np.float16)
    golden = np.concatenate([session.run(None, {edge.name: row[None].astype(dtype)})[0] for row in sample])
    stage = folder / "stage"
    for name in ("variants", "golden/inputs", "golden/outputs/a"):
        (stage / name).mkdir(parents=True)
    (stage / "variants/a.onnx").write_bytes(model.read_bytes())
    np.save(stage / "golden/inputs/0.npy", sample)
    np.save(stage / "golden/outputs/a/0.npy", golden)
    inputs = (TensorSpec(edge.name, (1, *edge.shape[1:]), dtype, "NCHW"),)
    outputs = (TensorSpec(out.name, (1, *out.shape[1:]), "float32"),)
    variant = Variant(
        "a", "onnxruntime", "int8", "variants/a.onnx", inputs, outputs, "golden/outputs/a", 30.0
    )
    manifest = Manifest(
        "lite0", "1", "host", Compatible(("host",)), inputs, outputs, (variant,),
        file_entries(stage, [p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file()]),
        "golden/inputs", {}, Provenance("0" * 64, "0" * 64),
    )  # fmt: skip
    target = folder / "lite0-1-host.edgeopt"
    write_package(stage, manifest, target)
    return target


def install(folder: Path, package: Path) -> Path:
    """Publish and install it as a device does; return the agent's configuration."""
    from datetime import UTC, datetime

    create_keys(folder / "keys")
    publish(package, folder / "repository", folder / "keys", now=datetime.now(UTC).replace(microsecond=0))
    config = folder / "agent.json"
    document = {
        "schema": "edgeopt.agent/1",
        "device": "d1",
        "device_class": "host",
        "state_dir": str(folder / "state"),
        "root": str(folder / "repository/metadata/1.root.json"),
        "transport": {"kind": "folder", "path": str(folder / "repository")},
    }
    config.write_text(json.dumps(document))
    subprocess.run([*COMMAND, "install", "--config", str(config), str(folder / "repository")], check=True)
    return config


def start(command: str, config: Path, image: np.ndarray, name: str) -> tuple[subprocess.Popen[bytes], float]:
    """Start the agent; return it and the seconds until its first answer."""
    path = config.parent / "state/agent.sock"
    began = time.monotonic()
    process = subprocess.Popen([*COMMAND, command, "--config", str(config)], stderr=subprocess.DEVNULL)
    while time.monotonic() - began < 60:
        with Client(path) as client:
            if client.is_ready("lite0"):
                client.infer("lite0", {name: image})
                return process, time.monotonic() - began
        time.sleep(0.005)
    process.kill()
    raise SystemExit("the agent never answered")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int, key: str) -> float:
    """A line of /proc/PID/status in MB (10^6 bytes)."""
    return int(Path(f"/proc/{pid}/status").read_text().split(f"{key}:")[1].split()[0]) * 1024 / 1e6


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Install, start several times, then stay idle."""
    config = install(folder, make_package(options.model, folder))
    manifest = json.loads((folder / "state/models/lite0/A/manifest.json").read_text())
    edge = manifest["signature_inputs"][0]
    image = np.zeros(edge["shape"], edge["dtype"])
    firsts = []
    for number in range(options.starts):
        process, seconds = start(options.command, config, image, edge["name"])
        firsts.append(seconds)
        if number < options.starts - 1:
            process.terminate()
            process.wait(60)
    try:
        with Client(folder / "state/agent.sock") as client:
            for _ in range(20):
                client.infer("lite0", {edge["name"]: image})
        time.sleep(2)
        before, began = cpu_seconds(process.pid), time.monotonic()
        time.sleep(options.seconds)
        cpu = (cpu_seconds(process.pid) - before) / (time.monotonic() - began)
        resident, peak = memory_mb(process.pid, "VmRSS"), memory_mb(process.pid, "VmHWM")
    finally:
        process.terminate()
        process.wait(60)
    found: dict[str, Any] = {
        "resident_mb": round(resident, 1),
        "peak_mb": round(peak, 1),
        "idle_cpu_share": round(cpu, 5),
        "first_answer_s": {"median": round(statistics.median(firsts), 3), "worst": round(max(firsts), 3)},
    }
    found["kept"] = {
        "resident": resident <= MAX_RSS_MB,
        "idle": cpu <= MAX_CPU,
        "first_answer": statistics.median(firsts) <= MAX_FIRST_S,
    }
    return found


def main() -> int:
    """Measure, print, and exit 3 where a promise is not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--command", choices=("run", "serve"), default="run")
    parser.add_argument("--seconds", type=float, default=20.0, help="of idleness")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(options, Path(name))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for key, value in found.items():
            print(f"{key:16} {value}")
    return 0 if all(found["kept"].values()) else 3


if __name__ == "__main__":
    sys.exit(main())
