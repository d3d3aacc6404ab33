# SPDX-License-Identifier: Apache-2.0
"""Ranges that were read from a trained net's batch normalizations, held against what real digits then give."""

from types import ModuleType

import numpy as np
import pytest

from edgeopt.onnx_graphs import fold, observer
from edgeopt.recipe import Recipe
from edgeopt.sources.torch_factory import TorchModel, export
from edgeopt.uncalibrated.noise import Interval, Noise
from edgeopt.uncalibrated.statistics import Statistics, read_statistics
from edgeopt_converters import path as conversion
from edgeopt_converters.model import Model
from edgeopt_wire.tensor import TensorSpec

WHOLE = Interval((0.0,), (1.0,))


def noise(inputs: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
    return dict(next(iter(Noise(inputs, WHOLE))).inputs)


@pytest.fixture(scope="module")
def read(digit_net: ModuleType) -> tuple[Statistics, Model]:
    module, example = digit_net.net()
    source = export(TorchModel(module, (example,)), "digits", Recipe(name="digits").name)
    base = conversion.convert(source.model, "onnx")
    return read_statistics(source.model, base.program, noise(base.inputs), WHOLE), base


def test_every_tensor_of_the_float_model_has_a_range_that_holds_real_values(
    read: tuple[Statistics, Model], digit_net: ModuleType
) -> None:
    """Nearly all values inside, and no end more than three bits too far, where a tensor takes values of any size."""
    found, base = read
    images, _ = digit_net.digits()
    watch = observer(fold(base.program))
    seen: dict[str, list[np.ndarray]] = {}
    for image in images[digit_net.TRAINED :][:60]:
        for name, values in watch({base.inputs[0].name: image[None]}):
            seen.setdefault(name, []).append(values.reshape(-1))
    assert set(seen) == set(found.spans)
    for name, parts in seen.items():
        values = np.concatenate(parts)
        low, high = found.spans[name]
        assert ((values >= low) & (values <= high)).mean() > 0.995, name
        width = max(values.max(), 0) - min(values.min(), 0)
        assert high - low < 10 * width, name


def test_what_no_normalization_follows_is_said(read: tuple[Statistics, Model]) -> None:
    found, _ = read
    assert (found.norms, found.layers, len(found.assumed)) == (4, 6, 2)
    tensors, layers = found.notes()
    assert "from 4 batch normalizations" in tensors
    assert layers.startswith("2 of 6 layers have no batch normalization behind them")
