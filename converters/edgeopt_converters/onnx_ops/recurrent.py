# SPDX-License-Identifier: Apache-2.0
"""LSTM and GRU, one or both directions, as PyTorch's own layers.

ONNX orders the gates of an LSTM i, o, f, c and of a GRU z, r, h; PyTorch i, f, g, o and r, z, n. ONNX keeps the state as
(direction, batch, hidden) and gives Y as (time, direction, batch, hidden).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from edgeopt_converters.onnx_ops import Call, Function, Tensor

_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
_DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}


def _recurrent(kind: str, call: Call) -> tuple[Tensor, ...]:
    import torch

    _check(kind, call)
    x, weight, recurrence, bias = call.tensor(0), call.tensor(1), call.tensor(2), call.optional(3)
    directions, hidden = weight.shape[0], call.get("hidden_size", recurrence.shape[-1])
    shape = (directions, x.shape[1], hidden)
    states = [_state(call, index, shape, x) for index in ((5, 6) if kind == "LSTM" else (5,))]
    flat: list[Tensor] = []
    for direction in range(directions):
        flat += [_reorder(kind, weight[direction]), _reorder(kind, recurrence[direction])]
        if bias is not None:
            gates = bias.shape[1] // 2
            flat += [_reorder(kind, bias[direction, :gates]), _reorder(kind, bias[direction, gates:])]
    is_reverse = call.get("direction", "forward") == "reverse"
    if is_reverse:
        x = x.flip(0)
    options = (bias is not None, 1, 0.0, False, directions == 2, False)
    if kind == "LSTM":
        found, *last = torch.lstm(x, states, flat, *options)
    else:
        found, *last = torch.gru(x, states[0], flat, *options)
    if is_reverse:
        found = found.flip(0)
    time, batch = found.shape[:2]
    return (found.reshape(time, batch, directions, hidden).transpose(1, 2), *last)


def _check(kind: str, call: Call) -> None:
    activations = call.get("activations", None)
    names = [name if isinstance(name, str) else name.decode() for name in activations or []]
    if names and any(name != _DEFAULTS[kind][i % len(_DEFAULTS[kind])] for i, name in enumerate(names)):
        raise call.refuse(f"its activations are {names}; PyTorch's layer has {_DEFAULTS[kind]}")
    if call.get("layout", 0) or "clip" in call.attributes or call.get("input_forget", 0):
        raise call.refuse("layout, clip or input_forget is set")
    if not call.optional_is_missing(4):
        lengths = call.constant(4)
        if lengths is not None and any(
            int(length) != call.tensor(0).shape[0] for length in lengths.reshape(-1)
        ):
            raise call.refuse("its sequences have different lengths")
    if kind == "LSTM" and not call.optional_is_missing(7):
        raise call.refuse("it has peepholes")
    if kind == "GRU" and not call.get("linear_before_reset", 0):
        raise call.refuse("linear_before_reset is 0; PyTorch's layer resets after the product")


def _state(call: Call, index: int, shape: Sequence[int], like: Tensor) -> Tensor:
    import torch

    found = call.optional(index)
    return torch.zeros(tuple(shape), dtype=like.dtype) if found is None else found


def _reorder(kind: str, weights: Tensor) -> Tensor:
    import torch

    parts = weights.chunk(len(_GATES[kind]), 0)
    return torch.cat([parts[gate] for gate in _GATES[kind]], 0)


OPERATORS: dict[str, Function] = {name: partial(_recurrent, name) for name in _GATES}
