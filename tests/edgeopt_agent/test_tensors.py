# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from edgeopt_agent.tensors import from_variant, to_variant
from edgeopt_wire.errors import RecipeError, RuntimeFailure, UnsupportedError
from edgeopt_wire.tensor import Affine, TensorSpec

NCHW = TensorSpec("image", (1, 3, 2, 2), "float32", "NCHW")
IMAGE = np.random.default_rng(3).normal(size=NCHW.shape).astype(np.float32)


def test_same_spec_passes_the_array_on_without_a_copy() -> None:
    assert to_variant([NCHW], [NCHW], {"image": IMAGE})["image"] is IMAGE


def test_layout_that_differs_is_transposed_both_ways() -> None:
    nhwc = TensorSpec("x", (1, 2, 2, 3), "float32", "NHWC")
    own = to_variant([NCHW], [nhwc], {"image": IMAGE})["x"]
    assert own.shape == (1, 2, 2, 3)
    assert own.flags.c_contiguous
    assert own[0, 1, 0, 2] == IMAGE[0, 2, 1, 0]
    np.testing.assert_array_equal(from_variant([nhwc], [NCHW], {"x": own})["image"], IMAGE)


def test_quantization_rounds_ties_to_even_and_clips() -> None:
    real = TensorSpec("x", (8,), "float32")
    integers = TensorSpec("q", (8,), "int8", affine=Affine(0.5, 10))
    values = np.array([0.25, 0.75, -0.25, -0.75, 1.0, 1000.0, -1000.0, 0.0], np.float32)
    found = to_variant([real], [integers], {"x": values})["q"]
    assert found.dtype == np.int8
    assert found.tolist() == [10, 12, 10, 8, 12, 127, -128, 10]


def test_dequantization_then_quantization_gives_the_same_integers() -> None:
    quantized = TensorSpec("q", (256,), "uint8", affine=Affine(0.0173, 131))
    real = TensorSpec("x", (256,), "float32")
    integers = np.arange(256, dtype=np.uint8)
    values = from_variant([quantized], [real], {"q": integers})["x"]
    assert values.dtype == np.float32
    assert values[131] == 0.0
    np.testing.assert_array_equal(to_variant([real], [quantized], {"x": values})["q"], integers)


def test_int8_and_uint8_of_the_same_scale_differ_by_128() -> None:
    unsigned = TensorSpec("u", (256,), "uint8", affine=Affine(0.02, 128))
    signed = TensorSpec("s", (256,), "int8", affine=Affine(0.02, 0))
    found = to_variant([unsigned], [signed], {"u": np.arange(256, dtype=np.uint8)})["s"]
    np.testing.assert_array_equal(found, np.arange(-128, 128))


def test_layout_and_quantization_together() -> None:
    own = TensorSpec("x", (1, 2, 2, 3), "int8", "NHWC", Affine(0.05, -3))
    found = to_variant([NCHW], [own], {"image": IMAGE})["x"]
    expected = np.clip(np.rint(IMAGE / np.float32(0.05)) - 3, -128, 127).astype(np.int8).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(found, expected)


def test_float16_input_and_output_are_casts() -> None:
    half = TensorSpec("h", NCHW.shape, "float16", "NCHW")
    own = to_variant([NCHW], [half], {"image": IMAGE})
    assert own["h"].dtype == np.float16
    assert from_variant([half], [NCHW], own)["image"].dtype == np.float32


def test_wider_float_input_is_cast_to_the_signature() -> None:
    assert to_variant([NCHW], [NCHW], {"image": IMAGE.astype(np.float64)})["image"].dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "expected the inputs"),
        ({"picture": IMAGE}, "picture"),
        ({"image": IMAGE, "more": IMAGE}, "more"),
        ({"image": IMAGE[0]}, r"shape \(1, 3, 2, 2\), found \(3, 2, 2\)"),
        ({"image": IMAGE.astype(np.complex64)}, "expected float32, found complex64"),
    ],
)
def test_wrong_input_is_refused_with_what_was_expected(arrays: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        to_variant([NCHW], [NCHW], arrays)


def test_float_input_for_token_ids_is_refused() -> None:
    tokens = TensorSpec("ids", (1, 4), "int64")
    with pytest.raises(RecipeError, match="expected int64, found float32"):
        to_variant([tokens], [tokens], {"ids": np.zeros((1, 4), np.float32)})


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (TensorSpec("x", NCHW.shape, "int8", "NCHW"), "only through an affine"),
        (TensorSpec("x", (1, 3, 4, 1), "float32"), "shapes do not fit"),
        (TensorSpec("x", (1, 2, 2, 3), "float32"), "say both layouts"),
        (TensorSpec("x", (1, 3, 2, 2), "float32", "NCDT"), "different axes"),
    ],
)
def test_specs_that_cannot_be_brought_together_are_refused(own: TensorSpec, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        to_variant([NCHW], [own], {"image": IMAGE})


def test_another_number_of_tensors_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="expected 1 tensors, found 2"):
        to_variant([NCHW], [NCHW, NCHW], {"image": IMAGE})


@pytest.mark.parametrize("wrong", [{}, {"image": IMAGE[0]}, {"image": IMAGE.astype(np.float64)}])
def test_runtime_that_answers_with_another_tensor_is_caught(wrong: dict) -> None:
    with pytest.raises(RuntimeFailure, match="output 'image': expected float32"):
        from_variant([NCHW], [NCHW], wrong)
