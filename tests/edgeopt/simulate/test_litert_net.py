# SPDX-License-Identifier: Apache-2.0
"""Predictions of int8 LiteRT files against the interpreter with XNNPACK: bit by bit where the arithmetic is known."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
from small_nets import NETS, inputs

from edgeopt.calibrate import Calibration
from edgeopt.passes import Order, quantize_litert
from edgeopt.simulate import litert_fixed
from edgeopt.simulate.agreement import total
from edgeopt.simulate.check import check_litert
from edgeopt.simulate.litert_net import LitertNet
from edgeopt.simulate.values import Grid, Quantized
from edgeopt_converters import path as conversion
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError, UnsupportedError

pytest.importorskip("ai_edge_quantizer")

INT8 = Scheme("int8", "int8", True, False)
SHARE = 0.999
DATA = Path(os.environ.get("EDGEOPT_DATA", "/nowhere"))


@functools.cache
def quantized(net: str) -> bytes:
    """Lowered through PyTorch and quantized with our ranges: the file that a build ships."""
    lowered = conversion.convert(NETS[net](), "litert")
    samples = [{lowered.inputs[0].name: sample} for sample in images(net, lowered.inputs[0].shape, 16)]
    made: bytes = quantize_litert.apply(lowered, Order(INT8, Calibration("minmax"), samples)).model.program
    return made


def images(net: str, shape: tuple[int, ...], count: int, seed: int = 0) -> list[np.ndarray]:
    found = inputs(NETS[net](), count, seed)
    return [
        sample if sample.shape == shape else np.ascontiguousarray(sample.transpose(0, 2, 3, 1))
        for sample in found
    ]


@pytest.mark.parametrize("net", ["convolutions", "branches", "hard-swish"])
def test_images_are_predicted_bit_by_bit(net: str) -> None:
    program = quantized(net)
    reader = LitertNet(program)
    samples = [{reader.inputs[0]: x} for x in images(net, reader.input_shapes[0], 10, seed=9)]
    found = check_litert(program, samples)
    assert total(found.pieces).near_share == 1
    assert total(found.pieces).exact >= SHARE * total(found.pieces).values, found.sentences()
    assert total(found.outputs).near_share >= SHARE, found.sentences()


def test_every_tensor_of_an_attention_block_is_within_one_step() -> None:
    """From the same inputs: a variance of 8 bits under a square root enlarges one step to many through the whole net."""
    program = quantized("attention")
    reader = LitertNet(program)
    samples = [{reader.inputs[0]: x} for x in images("attention", reader.input_shapes[0], 10, seed=9)]
    found = check_litert(program, samples)
    assert min(entry.near_share for entry in found.pieces) >= SHARE


@pytest.mark.parametrize(
    "name",
    [
        "mlperf-tiny/pretrainedResnet_quant.tflite",
        "coral/mobilenet_v1_0.25_128_quant.tflite",
        "coral/mobilenet_v1_0.5_160_quant.tflite",
        "coral/split_concat.tflite",
    ],
)
def test_published_int8_files_are_predicted_bit_by_bit(name: str) -> None:
    """Files that TensorFlow's own converters made, int8 and uint8, with one scale a tensor of weights or a channel."""
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not in EDGEOPT_DATA")
    program = (DATA / name).read_bytes()
    reader, rng = LitertNet(program), np.random.default_rng(0)
    limits = [np.iinfo(dtype) for dtype in reader.input_dtypes]
    samples = [
        {
            key: rng.integers(limit.min, limit.max + 1, shape).astype(limit.dtype)
            for key, shape, limit in zip(reader.inputs, reader.input_shapes, limits, strict=True)
        }
        for _ in range(3)
    ]
    found = check_litert(program, samples)
    assert total(found.pieces).exact == total(found.pieces).values, found.sentences()
    assert total(found.outputs).near == total(found.outputs).values


@pytest.mark.parametrize("name", ["deeplabv3_mnv2_dm05_pascal_quant", "keras_lstm_mnist_ptq"])
def test_operators_that_are_not_simulated_are_named(name: str) -> None:
    file = DATA / f"coral/{name}.tflite"
    if not file.is_file():
        pytest.skip(f"{name} is not in EDGEOPT_DATA")
    with pytest.raises(UnsupportedError, match=r"RESIZE_BILINEAR|UNIDIRECTIONAL_SEQUENCE_LSTM"):
        LitertNet(file.read_bytes())


def test_a_missing_input_is_named() -> None:
    with pytest.raises(RecipeError, match="missing"):
        LitertNet(quantized("hard-swish")).run({"photo": np.zeros(1)})


def test_a_sum_keeps_its_halves_upwards() -> None:
    """2 * 0.5 + 1 * 0.5 is 1.5 steps, and -1.5 becomes -1: fixed point rounds halves up, not to even."""
    half = Grid(np.dtype(np.int8), np.asarray([0.5], np.float32), np.asarray([0], np.int32))
    one = Grid(np.dtype(np.int8), np.asarray([1.0], np.float32), np.asarray([0], np.int32))
    first, second = (Quantized(np.array(values, np.int8), half) for values in ([2, -2], [1, -1]))
    assert litert_fixed.add(first, second, one).tolist() == [2, -1]
    assert litert_fixed.add(first, second, one, sign=-1).tolist() == [1, 0]


def test_rows_are_rounded_to_their_own_range() -> None:
    rows = np.array([[0.0, 255.0, 51.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    found, steps = litert_fixed.rows_to_integers(rows)
    assert np.allclose(found * steps[:, None], rows, atol=1 / 255)
    assert found[0].tolist() == [0, 255, 51]
    assert found[2].tolist() == [0, 0, 0]
