# SPDX-License-Identifier: Apache-2.0
"""Running a file of any of the formats by the bare call of its runtime.

Rules:
- Inputs are matched by name where a file knows all names, else by position; inputs that a file lost (constants) come
  last. NCHW is turned to NHWC where a file wants that.
- A file's ending says what runs it; OpenVINO takes .onnx files as well, so that the runtime can be named.
- OpenVINO gets the settings of our agent: by itself it computes floats in bfloat16 where the CPU has it.
- ExecuTorch has one pool of threads a process: open files of one number of threads in one process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from work import layout_for

if TYPE_CHECKING:
    import numpy as np

Run = Callable[[Mapping[str, "np.ndarray"]], "list[np.ndarray]"]
"""One inference of one sample (arrays in the order of the float file's inputs), giving all outputs as float32."""

RUNTIMES = {".onnx": "onnxruntime", ".tflite": "litert", ".pte": "executorch", ".xml": "openvino"}
"""What runs a file, by its ending, unless somebody says otherwise."""

FORMATS = {"onnxruntime": "onnx", "litert": "litert", "executorch": "executorch", "openvino": "onnx"}
"""The format of a runtime's float file."""


def runtime_of(path: Path) -> str:
    """The runtime that a file is made for."""
    return RUNTIMES[path.suffix]


def open_file(path: Path, threads: int, runtime: str = "") -> Run:
    """Load a file into its runtime, or into the one that is named."""
    opens = {
        "onnxruntime": _open_onnx, "litert": _open_litert, "executorch": _open_executorch, "openvino": _open_openvino,
    }  # fmt: skip
    return opens[runtime or runtime_of(path)](path, threads)


def size_of(path: Path) -> int:
    """Bytes of a file, with the weights that OpenVINO's own form keeps beside it."""
    beside = path.with_suffix(".bin")
    return path.stat().st_size + (beside.stat().st_size if path.suffix == ".xml" else 0)


def feed(
    names: Sequence[str], shapes: Sequence[tuple[Any, ...]], sample: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Match a sample to a file's inputs."""
    if len(names) > len(sample):
        raise ValueError(
            f"the file wants {len(names)} inputs ({', '.join(names)}), a sample has {len(sample)}"
        )
    arrays = [sample[name] for name in names] if set(names) <= set(sample) else list(sample.values())
    matched = zip(names, arrays, shapes, strict=False)
    return {name: layout_for(array, shape) for name, array, shape in matched}


def onnx_feed(path: Path, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A sample by the names of an ONNX file's own inputs."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [given for given in graph.input if given.name not in weights]
    shapes = [tuple(axis.dim_value for axis in given.type.tensor_type.shape.dim) for given in inputs]
    return feed([given.name for given in inputs], shapes, sample)


def _open_onnx(path: Path, threads: int) -> Run:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # threads that spin for work after an inference would take the second core from the file whose turn is next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    shapes = [tuple(given.shape) for given in session.get_inputs()]

    def run(sample: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [np.asarray(found) for found in session.run(None, feed(names, shapes, sample))]

    return run


def _open_openvino(path: Path, threads: int) -> Run:
    from edgeopt_agent.runtimes.openvino import DEVICE, library, settings

    core = library().Core()
    model = core.read_model(str(path))
    requests: list[Any] = []

    def request(sample: Mapping[str, np.ndarray]) -> Any:
        if not requests:
            if model.is_dynamic():
                given = feed(_port_names(model.inputs, sample), [()] * len(model.inputs), sample).values()
                model.reshape({number: list(array.shape) for number, array in enumerate(given)})
            requests.append(core.compile_model(model, DEVICE, settings(threads)).create_infer_request())
        return requests[0]

    def run(sample: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        ready, names = request(sample), _port_names(model.inputs, sample)
        shapes = [tuple(tensor.shape) for tensor in ready.input_tensors]
        ready.infer(list(feed(names, shapes, sample).values()), share_inputs=True)
        return [tensor.data.copy() for tensor in ready.output_tensors]

    return run


def _port_names(ports: Sequence[Any], sample: Mapping[str, np.ndarray]) -> list[str]:
    """A tensor can have several names: that of the sample's, if it has it; some have none."""
    found = []
    for number, port in enumerate(ports):
        names = sorted(port.get_names())
        found.append(next((name for name in names if name in sample), (*names, f"input {number}")[0]))
    return found


def _open_executorch(path: Path, threads: int) -> Run:
    import torch
    from executorch.extension.pybindings import _C as library

    if library._threadpool_get_thread_count() != threads:
        library._unsafe_reset_threadpool(threads)
    program = library._load_program(str(path))
    method = program.load_method("forward")
    meta = method.method_meta()
    shapes = [tuple(meta.input_tensor_meta(place).sizes()) for place in range(meta.num_inputs())]
    names = [f"input {place}" for place in range(len(shapes))]

    def run(sample: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        arrays = feed(names, shapes, sample).values()
        return [tensor.numpy() for tensor in method(tuple(map(torch.from_numpy, arrays)))]

    return run


def _open_litert(path: Path, threads: int) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    entries, leaves = _in_order(interpreter.get_input_details()), _in_order(interpreter.get_output_details())
    names, shapes = [entry["name"] for entry in entries], [tuple(entry["shape"]) for entry in entries]

    def run(sample: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        arrays = feed(names, shapes, sample).values()
        for entry, array in zip(entries, arrays, strict=True):
            interpreter.set_tensor(entry["index"], _quantized(array, entry))
        interpreter.invoke()
        return [_floats(interpreter.get_tensor(leaf["index"]), leaf) for leaf in leaves]

    return run


def _in_order(tensors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By the number that PyTorch's converter puts into names (args_0, output_1); else as the file has them."""
    numbers = [re.search(r"(?:args|output)_(\d+)", tensor["name"]) for tensor in tensors]
    if not all(numbers):
        return list(tensors)
    keys = [int(number[1]) for number in numbers if number]
    return [tensor for _, tensor in sorted(zip(keys, tensors, strict=True), key=lambda pair: pair[0])]


def _quantized(array: np.ndarray, tensor: Mapping[str, Any]) -> np.ndarray:
    import numpy as np

    kind = np.dtype(tensor["dtype"])
    scale, zero = tensor["quantization"]
    if kind.kind == "f" or not scale:
        return array.astype(kind)
    limits = np.iinfo(kind)
    return np.asarray(np.clip(np.round(array / scale + zero), limits.min, limits.max), kind)


def _floats(array: np.ndarray, tensor: Mapping[str, Any]) -> np.ndarray:
    import numpy as np

    scale, zero = tensor["quantization"]
    if array.dtype.kind == "f" or not scale:
        return np.asarray(array)
    return np.asarray((array.astype(np.float32) - zero) * scale, np.float32)
