# SPDX-License-Identifier: Apache-2.0
"""`make bench`: our int8 files beside the runtimes' own quantizers, same model, same photos, same run.

Every figure is a ratio or stands beside its peer. Files are timed interleaved (A, B, A, B, ...) by the bare runtime
call with one thread, so that a machine that changes speed changes it for all. Nothing is asserted: a person reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from edgeopt.artifacts import tool_versions
from edgeopt.cache import Cache
from edgeopt.calibrate import Calibration
from edgeopt.compress import make_artifacts
from edgeopt.demo.model import PREPROCESS, efficientnet_lite0
from edgeopt.demo.photos import prepare
from edgeopt.evaluate.metrics import SQNR_CEILING_DB
from edgeopt.evaluate.preprocess import Preprocess
from edgeopt.evaluate.samples import load_samples
from edgeopt.plan import make_plan
from edgeopt.progress import Progress
from edgeopt.recipe import Recipe
from edgeopt.sources.torch_factory import export
from edgeopt.workbench import Workbench
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.measurement import nearest_rank

ROUNDS = 40
RUNS_A_ROUND = 5
WARMUP = 20

Run = Callable[[np.ndarray], np.ndarray]
"""One inference of an NCHW float32 photo, giving float32 logits."""


@dataclass
class Row:
    """One file of the table."""

    name: str
    runtime: str
    file_bytes: int
    build_s: float
    agreement: float = 0.0
    top1: float = 0.0
    sqnr_db: float = 0.0
    min_ms: float = 0.0
    p50_ms: float = 0.0
    p90_ms: float = 0.0
    against_float: float = 0.0
    against_peer: float | None = None


def main() -> None:
    """Build, time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--limit", type=int, help="evaluate on this many photos")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = prepare(folder / "photos")
        files = _files(folder, photos.calibration)
        runs = {label: _runner(path) for label, (path, _) in files.items()}
        rows = {
            label: Row(label, _runtime(path), path.stat().st_size, s) for label, (path, s) in files.items()
        }
        samples = load_samples(str(photos.evaluation), _inputs(), _preprocess(), limit=args.limit, seed=1)
        _compare(rows, runs, samples)
        _time(rows, runs, next(iter(samples)))
    document = _document(rows, photos.description)
    _print(rows, document)
    if args.json:
        args.json.write_text(json.dumps(document, indent=2))


def _inputs() -> Any:
    return export(efficientnet_lite0(), "bench", "efficientnet-lite0").model.inputs


def _preprocess() -> Preprocess:
    return Preprocess.from_mapping(PREPROCESS)


def _files(folder: Path, calibration: Path) -> dict[str, tuple[Path, float]]:
    """Label -> (model file, seconds it took to quantize)."""
    source = export(efficientnet_lite0(), "bench", "efficientnet-lite0")
    samples = load_samples(str(calibration), source.model.inputs, _preprocess(), limit=128, seed=0)
    plan = make_plan(load_profile("host"), Recipe(calibration=Calibration()))
    progress = Progress()
    bench = Workbench(Cache(None), folder / "ours", progress, tool_versions())
    made = make_artifacts(plan, source, samples, Recipe(), bench)
    seconds = {entry.name.split()[-1]: entry.seconds for entry in progress.finished}
    found: dict[str, tuple[Path, float]] = {}
    for artifact, label in (("onnx-fp32", "float, ONNX Runtime"), ("litert-fp32", "float, LiteRT")):
        found[label] = (_copy(made[artifact].file, folder / f"{artifact}{_suffix(artifact)}"), 0.0)
    for artifact_id, entry in made.items():
        if entry.artifact.precision == "int8":
            label = f"edgeopt, {'ONNX Runtime' if entry.artifact.format == 'onnx' else 'LiteRT'}"
            found[label] = (
                _copy(entry.file, folder / f"{artifact_id}{_suffix(artifact_id)}"),
                seconds[artifact_id],
            )
    onnx_file, litert_file = found["float, ONNX Runtime"][0], found["float, LiteRT"][0]
    name = source.model.inputs[0].name
    arrays = [np.ascontiguousarray(sample.inputs[name]) for sample in samples]
    found["onnxruntime's quantizer"] = _timed(lambda: _peer_onnx(onnx_file, arrays, folder / "peer.onnx"))
    found["ai-edge-quantizer"] = _timed(lambda: _peer_litert(litert_file, arrays, folder / "peer.tflite"))
    return found


def _suffix(artifact: str) -> str:
    return ".onnx" if artifact.startswith("onnx") else ".tflite"


def _copy(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes())
    return target


def _timed(make: Callable[[], Path]) -> tuple[Path, float]:
    start = time.perf_counter()
    path = make()
    return path, time.perf_counter() - start


def _peer_onnx(source: Path, arrays: list[np.ndarray], target: Path) -> Path:
    """What its documentation recommends for x86 with VNNI: pre-process, QDQ, U8S8, per channel, min-max."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.rows: Iterator[dict[str, np.ndarray]] = iter([{name: array} for array in arrays])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    name = ort.InferenceSession(str(prepared)).get_inputs()[0].name
    quantize_static(
        str(prepared), str(target), Reader(name), per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return target


def _peer_litert(source: Path, arrays: list[np.ndarray], target: Path) -> Path:
    """Its static int8 recipe with its own calibration."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import algorithm_manager, quantizer, recipe
    from ai_edge_quantizer.qtyping import TFLOperationName

    key, signature = next(iter(Interpreter(str(source)).get_signature_list().items()))
    maker = quantizer.Quantizer(str(source))
    maker.load_quantization_recipe(recipe.static_wi8_ai8())
    for edge in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
        maker.update_quantization_recipe(
            regex=".*", operation_name=edge, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE
        )
    wants_channels_last = _wants_channels_last(source)
    rows = [{signature["inputs"][0]: _laid_out(array, wants_channels_last)} for array in arrays]
    result = maker.quantize(maker.calibrate({key: rows}, num_threads=1), enable_progress_report=False)
    target.write_bytes(result.quantized_model)
    return target


def _wants_channels_last(path: Path) -> bool:
    from ai_edge_litert.interpreter import Interpreter

    return bool(Interpreter(str(path)).get_input_details()[0]["shape"][-1] == 3)


def _laid_out(array: np.ndarray, channels_last: bool) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if channels_last else array


def _runtime(path: Path) -> str:
    return "onnxruntime" if path.suffix == ".onnx" else "litert"


def _runner(path: Path) -> Run:
    if path.suffix == ".onnx":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: np.asarray(session.run(None, {name: x})[0])
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    entry, leave = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    channels_last = _wants_channels_last(path)

    def run(x: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(entry, _laid_out(x, channels_last))
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(leave))

    return run


def _compare(rows: dict[str, Row], runs: dict[str, Run], samples: Any) -> None:
    outputs: dict[str, list[np.ndarray]] = {label: [] for label in runs}
    labels = []
    for sample in samples:
        x = next(iter(sample.inputs.values()))
        labels.append(sample.label)
        for label, run in runs.items():
            outputs[label].append(run(x).reshape(-1))
    baseline = np.stack(outputs["float, ONNX Runtime"]).astype(np.float64)
    truth = np.array(labels)
    for label, found in outputs.items():
        values = np.stack(found).astype(np.float64)
        rows[label].agreement = float((values.argmax(1) == baseline.argmax(1)).mean())
        rows[label].top1 = float((values.argmax(1) == truth).mean())
        noise = ((values - baseline) ** 2).sum()
        rows[label].sqnr_db = float(10 * np.log10((baseline**2).sum() / noise)) if noise else SQNR_CEILING_DB


def _time(rows: dict[str, Row], runs: dict[str, Run], sample: Any) -> None:
    x = next(iter(sample.inputs.values()))
    times: dict[str, list[int]] = {label: [] for label in runs}
    for run in runs.values():
        for _ in range(WARMUP):
            run(x)
    for _ in range(ROUNDS):
        for label, run in runs.items():
            for _ in range(RUNS_A_ROUND):
                start = time.perf_counter_ns()
                run(x)
                times[label].append(time.perf_counter_ns() - start)
    for label, found in times.items():
        found.sort()
        row = rows[label]
        row.min_ms, row.p50_ms, row.p90_ms = (
            found[0] / 1e6,
            nearest_rank(found, 50) / 1e6,
            nearest_rank(found, 90) / 1e6,
        )
    peers = {"onnxruntime": "onnxruntime's quantizer", "litert": "ai-edge-quantizer"}
    floats = {"onnxruntime": "float, ONNX Runtime", "litert": "float, LiteRT"}
    for row in rows.values():
        row.against_float = rows[floats[row.runtime]].p50_ms / row.p50_ms
        if row.name.startswith("edgeopt"):
            row.against_peer = row.p50_ms / rows[peers[row.runtime]].p50_ms


def _document(rows: dict[str, Row], photos: str) -> dict[str, Any]:
    return {
        "schema": "edgeopt.benchmark/1",
        "model": "EfficientNet-Lite0",
        "photos": photos,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "conditions": f"1 thread, {ROUNDS * RUNS_A_ROUND} runs a file, interleaved by {RUNS_A_ROUND}",
        "rows": [asdict(row) for row in rows.values()],
    }


def _print(rows: dict[str, Row], document: dict[str, Any]) -> None:
    table = Table(
        title=f"{document['model']}: {document['conditions']}; {document['photos']}", title_justify="left"
    )
    headings = (
        "file",
        "MB",
        "made in s",
        "top-1",
        "agreement",
        "SQNR dB",
        "min ms",
        "p50 ms",
        "p90 ms",
        "x float",
        "/ peer",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "file" else "right")
    for row in rows.values():
        table.add_row(
            row.name, f"{row.file_bytes / 1e6:.3f}", f"{row.build_s:.1f}", f"{row.top1:.3f}", f"{row.agreement:.3f}",
            f"{row.sqnr_db:.1f}", f"{row.min_ms:.2f}", f"{row.p50_ms:.2f}", f"{row.p90_ms:.2f}",
            f"{row.against_float:.2f}", "-" if row.against_peer is None else f"{row.against_peer:.3f}",
        )  # fmt: skip
    Console(width=140).print(table)
    Console(width=140).print(
        f"[dim]{document['machine']}. Photos are probably training images: compare, do not quote top-1.[/]"
    )


if __name__ == "__main__":
    main()
