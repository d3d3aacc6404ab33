# SPDX-License-Identifier: Apache-2.0
"""Changes to a cut-out operator, each of which takes one thing away that may keep it out of integers.

A repair knows nothing of what the runtime wants: whether it helps is found by letting the runtime optimize the repaired
cut (`edgeopt.coverage._causes`). Each changes the patient and says what stood in the way and what a user would do, or
gives None where there is nothing of its kind. Values are stand-ins: what a cut computes does not matter, only which
kernels it gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeopt.coverage._cuts import DEQUANTIZE, QUANTIZE
from edgeopt.coverage._patient import BIASED, Patient

LEFT_OUT = "left out"
_OF_TWO = ("Add", "Mul")
"""Their integer kernels want both operands in integers, constants too."""
_NEWEST_OPSET = 21
_EIGHT_BITS = ("int8", "uint8")


@dataclass(frozen=True)
class Said:
    """What a repair took away (`why`), and how a user would (`remedy`); `key` is the same for all of a kind."""

    key: str
    why: str
    remedy: str


def _quantize_inputs(patient: Patient) -> Said | None:
    operands = patient.data()
    if patient.node.op_type in _OF_TWO:
        operands += [name for name in patient.node.input if patient.is_constant(name)]
    found = [name for name in operands if patient.dequantizer(name) is None]
    if not found:
        return None
    writer = patient.writer(found[0])
    for number, name in enumerate(found):
        end = f"repaired_input_{number}"
        patient.add_pair(name, end)
        inputs = [end if entry == name else entry for entry in patient.node.input]
        patient.node.ClearField("input")
        patient.node.input.extend(inputs)
    if patient.is_constant(found[0]):
        return Said("float constant", f"its constant {found[0]!r} is a float", "quantize that constant too")
    if writer is None:
        return Said(
            "float input",
            f"its input {found[0]!r} enters the model in floats",
            "put a QuantizeLinear behind that input",
        )
    where = f"{writer.op_type} {writer.name!r}"
    return Said(
        "float input",
        f"its input {found[0]!r} comes from {where} in floats",
        f"quantize what {where} gives, or use an operator in its place that runs in integers",
    )


def _quantize_weights(patient: Patient) -> Said | None:
    import onnx

    name = patient.weights()
    tensor = patient.constant(name) if name else None
    if tensor is None:
        return None
    patient.set_weights(like=onnx.numpy_helper.to_array(tensor))
    if not patient.data_dequantizers():
        return Said(
            LEFT_OUT,
            f"its weights {name!r} and its input {patient.node.input[0]!r} are floats: the quantizer left it out",
            "quantize it: is it excluded, or its type?",
        )
    return Said(
        "float weights",
        f"its weights {name!r} are floats",
        "quantize them: is this operator or its type excluded, or are the weights shared?",
    )


def _skip_activation(patient: Patient) -> Said | None:
    readers = patient.readers(patient.node.output[0])
    if len(readers) != 1 or readers[0].op_type not in ("Relu", "Clip"):
        return None
    activation = readers[0]
    following = patient.readers(activation.output[0])
    if not following or any(reader.op_type != QUANTIZE for reader in following):
        return None
    for reader in following:
        reader.input[0] = patient.node.output[0]
    patient.graph.node.remove(activation)
    return Said(
        "activation not absorbed",
        f"the {activation.op_type} {activation.name!r} between it and its QuantizeLinear is not absorbed, as its ends are "
        "not those of the integers",
        "let the range of that QuantizeLinear begin and end where the activation does (from 0 for a Relu)",
    )


def _quantize_output(patient: Patient) -> Said | None:
    name = patient.node.output[0]
    readers = patient.readers(name)
    floats = [reader for reader in readers if reader.op_type != QUANTIZE]
    if readers and not floats and not patient.is_shown(name):
        return None
    weights = patient.weights()
    patient.node.output[0] = f"{name}_unquantized"
    patient.add_pair(patient.node.output[0], name)
    if weights and patient.dequantizer(weights) is None:
        return Said(
            LEFT_OUT,
            f"its weights {weights!r} and its output {name!r} are floats: the quantizer left it out",
            "quantize it: is it excluded, or its type?",
        )
    if not floats:
        return Said(
            "float output",
            f"its output {name!r} leaves it in floats, with no QuantizeLinear behind it",
            "put a QuantizeLinear and a DequantizeLinear behind it",
        )
    where = f"{floats[0].op_type} {floats[0].name!r}"
    return Said(
        "float output",
        f"its output {name!r} goes to {where} in floats, with no QuantizeLinear between them",
        f"put a QuantizeLinear and a DequantizeLinear before {where}, or use an activation that is absorbed (Relu, Clip)",
    )


def _one_type(patient: Patient) -> Said | None:
    before = [patient.dtype(node) for node in patient.data_dequantizers()]
    after = [patient.dtype(node) for node in patient.quantizers()]
    if len({*before, *after}) < 2 or not before:
        return None
    patient.change_activations([*patient.data_dequantizers(), *patient.quantizers()], before[0])
    return Said(
        "mixed types",
        f"it reads {' and '.join(dict.fromkeys(before))} and writes {' and '.join(dict.fromkeys(after)) or 'floats'}, where "
        "the runtime fuses activations of one type only",
        "give all activations one type: uint8 on x86",
    )


def _unsigned(patient: Patient) -> Said | None:
    found = [
        node
        for node in patient.graph.node
        if node.op_type in (QUANTIZE, DEQUANTIZE)
        and not patient.is_constant(node.input[0])
        and patient.dtype(node) == "int8"
    ]
    if not found:
        return None
    near = [node.input[0] for node in patient.data_dequantizers()] + [
        node.output[0] for node in patient.quantizers()
    ]
    counts = {name: _uses(patient, name) for name in near}
    shared = next((name for name, count in counts.items() if count > 1), None)
    patient.change_activations(found, "uint8")
    why = "its activations are int8, which ONNX Runtime runs on x86 only where it can turn them into uint8"
    if shared is not None:
        why += f"; {shared!r} is read {counts[shared]} times, and it turns only what is read once"
    return Said("int8 activations", why, "quantize activations to uint8 for x86 (weights stay int8)")


def _uses(patient: Patient, name: str) -> int:
    readers = patient.readers(name)
    return sum(
        len(patient.readers(reader.output[0])) if reader.op_type == DEQUANTIZE else 1 for reader in readers
    )


def _activations_per_tensor(patient: Patient) -> Said | None:
    nodes = [*patient.data_dequantizers(), *patient.quantizers()]
    found = [node for node in nodes if patient.is_per_channel(node)]
    if not found:
        return None
    patient.merge_channels(found)
    return Said(
        "activations per channel",
        "its activations are quantized per channel, and the runtime fuses only one scale for an activation",
        "quantize activations per tensor (weights stay per channel)",
    )


def _eight_bits(patient: Patient) -> Said | None:
    nodes = [*patient.data_dequantizers(), *patient.quantizers()]
    wide = [patient.dtype(node) for node in nodes if patient.dtype(node) not in _EIGHT_BITS]
    if not wide:
        return None
    patient.change_activations(nodes, "uint8")
    return Said(
        f"{wide[0]} activations",
        f"its activations are {wide[0]}, for which the runtime has no integer kernel",
        "quantize its activations to 8 bits, or leave it in floats without QuantizeLinear around it",
    )


def _signed_weights(patient: Patient) -> Said | None:
    node = patient.weight_dequantizer()
    if node is None or patient.dtype(node) == "int8" or patient.constant(node.input[0]) is None:
        return None
    dtype = patient.dtype(node)
    patient.set_weights()
    return Said(f"{dtype} weights", f"its weights are {dtype}", "quantize its weights to int8, symmetric")


def _symmetric_weights(patient: Patient) -> Said | None:
    import onnx

    node = patient.weight_dequantizer()
    zero = patient.constant(node.input[2]) if node is not None and len(node.input) > 2 else None
    if zero is None or patient.dtype(node) != "int8" or not onnx.numpy_helper.to_array(zero).any():
        return None
    patient.set_weights()
    return Said(
        "weights with a zero point",
        "its weights have a zero point other than 0",
        "quantize its weights symmetrically (zero point 0)",
    )


def _weights_per_tensor(patient: Patient) -> Said | None:
    node = patient.weight_dequantizer()
    scale = patient.constant(node.input[1]) if node is not None else None
    if scale is None or len(scale.dims) == 0 or patient.constant(node.input[0]) is None:
        return None
    attributes = {entry.name: entry.i for entry in node.attribute}
    patient.set_weights()
    if attributes.get("block_size", 0):
        return Said(
            "weights in blocks",
            f"its weights are quantized in blocks of {attributes['block_size']}",
            "quantize its weights per channel, or use MatMulNBits",
        )
    return Said(
        "axis of the weights",
        f"its weights are quantized per channel along axis {attributes.get('axis', 1)}",
        "quantize them along the output channels (axis 0 of a Conv, 1 of a MatMul) or per tensor",
    )


def _fitting_bias(patient: Patient) -> Said | None:
    node = patient.node
    if node.op_type not in BIASED or len(node.input) < 3:
        return None
    name = node.input[2]
    dequantizer = patient.dequantizer(name)
    what = "float" if dequantizer is None else patient.dtype(dequantizer)
    if not patient.set_bias():
        return None
    return Said(
        f"{what} bias",
        f"its bias {name!r} is {what}, and the runtime fuses it here only as int32 with the scale of the input times that of "
        "the weights",
        "quantize its bias so",
    )


def _plain_gemm(patient: Patient) -> Said | None:
    odd = [entry for entry in patient.node.attribute if entry.name in ("alpha", "beta") and entry.f != 1.0]
    if patient.node.op_type != "Gemm" or not odd:
        return None
    text = ", ".join(f"{entry.name}={entry.f:g}" for entry in odd)
    for entry in odd:
        entry.f = 1.0
    return Said("alpha or beta", f"it has {text}", "fold alpha into the weights and beta into the bias")


def _newer_opset(patient: Patient) -> Said | None:
    opset = next((entry for entry in patient.model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset is None or opset.version >= _NEWEST_OPSET:
        return None
    old, opset.version = opset.version, _NEWEST_OPSET
    return Said("old opset", f"the file's opset is {old}", f"export the model with opset {_NEWEST_OPSET}")


def _standard_domain(patient: Patient) -> Said | None:
    found = [node for node in patient.graph.node if node.op_type in (QUANTIZE, DEQUANTIZE) and node.domain]
    domains = {node.domain for node in found}
    for node in found:
        node.domain = ""
    if not found:
        return None
    return Said(
        "foreign QuantizeLinear",
        f"its QuantizeLinear and DequantizeLinear are those of {' and '.join(sorted(domains))}",
        "use those of ONNX itself (opset 21 has 16 bits)",
    )


REPAIRS: tuple[Callable[[Patient], Said | None], ...] = (
    _quantize_weights,
    _activations_per_tensor,
    _eight_bits,
    _one_type,
    _unsigned,
    _signed_weights,
    _symmetric_weights,
    _weights_per_tensor,
    _plain_gemm,
    _standard_domain,
    _newer_opset,
    _skip_activation,
    _quantize_output,
    _quantize_inputs,
    _fitting_bias,
)
"""In the order in which they are applied together: a bias is judged when the scales before it are settled."""

MILD = (_fitting_bias,)
"""Tried alone before the others, because it changes least."""

LAST = (_newer_opset,)
"""Tried together with others only if nothing else helps: another opset can make a correct cut a wrong one."""
