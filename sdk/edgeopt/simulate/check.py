# SPDX-License-Identifier: Apache-2.0
"""Predictions of int8 files next to what the runtimes give here: piece by piece, and through the whole net.

Piece by piece every operator computes from the integers that the prediction has there (`apart`, `litert_apart`), so that
both get the same inputs and nothing adds up. Through the whole net the file runs as it is shipped, and its outputs are
compared: in their own steps where they are quantized, else in 255ths of their span.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.simulate.agreement import Agreement, by_tensor, total
from edgeopt.simulate.apart import integers, take_apart
from edgeopt.simulate.integer import IntegerNet, Prediction
from edgeopt.simulate.values import Quantized

if TYPE_CHECKING:
    import numpy as np

STEPS = 255
"""How many steps eight bits divide an output's span into, where it is not quantized."""

FLOAT_SLACK = 1e-3
"""Part of a step: float32 sums in another order differ by less."""


@dataclass(frozen=True)
class Checked:
    """How a file's prediction agrees with its runtime: each tensor from the same inputs, and the outputs of the whole."""

    pieces: tuple[Agreement, ...]
    outputs: tuple[Agreement, ...]

    def sentences(self) -> tuple[str, ...]:
        """Both statements, one line each."""
        return (
            f"each tensor from the same inputs: {total(self.pieces).sentence()}",
            f"outputs through the whole net: {total(self.outputs).sentence()}",
        )


def check_onnx(
    program: Any, samples: Iterable[Mapping[str, np.ndarray]], *, native_int8: bool = False
) -> Checked:
    """Compare the prediction of a QDQ model with ONNX Runtime on one thread.

    Args:
        program: ONNX ModelProto.
        samples: Inputs by name, batch 1.
        native_int8: Keep activations of int8 as they are, which is what ONNX Runtime does on ARM; on x86 they become
            uint8. The kernels are this machine's in either case.

    Raises:
        UnsupportedError: The model has operators that are not simulated.
    """
    net = IntegerNet(program, native_int8=native_int8)
    apart = take_apart(program)
    pieces, whole = (_session(each, native_int8) for each in (apart.program, program))
    names = [output.name for output in whole.get_outputs()]
    seen, ended = [], []
    for sample in samples:
        found = net.run(sample)
        reals = {name: Quantized(found.integers[name], net.grid(name)).real() for name in apart.tensors}
        given = pieces.run(list(apart.outputs), apart.feeds(sample, reals)) if apart.tensors else []
        seen.append(
            [
                Agreement.count(name, found.integers[name], integers(values, net.grid(name)))
                for name, values in zip(apart.tensors, given, strict=True)
            ]
        )
        ended.append(_outputs(found, dict(zip(names, whole.run(names, dict(sample)), strict=True))))
    return Checked(by_tensor(seen), by_tensor(ended))


def check_litert(program: bytes, samples: Iterable[Mapping[str, np.ndarray]]) -> Checked:
    """Compare the prediction of an int8 LiteRT file with the interpreter and XNNPACK, one thread.

    Samples have the names of the file's own tensors (`LitertNet.inputs`) and its layout.

    Raises:
        UnsupportedError: The file has operators that are not simulated.
    """
    from edgeopt.simulate import litert_apart
    from edgeopt.simulate.litert_net import LitertNet

    net = LitertNet(program)
    apart, whole = litert_apart.take_apart(program), litert_apart.as_it_is(program)
    seen, ended = [], []
    for sample in samples:
        found = net.run(sample)
        given = apart.run({**sample, **found.integers})
        seen.append([Agreement.count(name, found.integers[name], given[name]) for name in apart.tensors])
        ended.append(_outputs(found, whole.run(sample)))
    return Checked(by_tensor(seen), by_tensor(ended))


def _outputs(found: Prediction, expected: Mapping[str, np.ndarray]) -> list[Agreement]:
    import numpy as np

    entries = []
    for name, values in expected.items():
        own = found.outputs[name]
        if values.dtype.kind in "iu":
            entries.append(Agreement.count(name, own, values))
            continue
        step = float(np.ptp(values)) / STEPS or 1.0
        off = np.abs(own.astype(np.float64) - values) / step
        exact, near = (int((off <= limit + FLOAT_SLACK).sum()) for limit in (0, 1))
        entries.append(Agreement(name, values.size, exact, near))
    return entries


def _session(program: Any, native_int8: bool) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if native_int8:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    return ort.InferenceSession(program.SerializeToString(), options, providers=["CPUExecutionProvider"])
