# SPDX-License-Identifier: Apache-2.0
"""Predictions of whole real nets: MLPerf Tiny's ResNet8, a keyword spotter, a hard-swish net, EfficientNet-Lite0."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from edgeopt.calibrate import Calibration
from edgeopt.passes import Order, fuse_operators, quantize_litert, quantize_static, respell_operators
from edgeopt.simulate.agreement import total
from edgeopt.simulate.check import check_litert, check_onnx
from edgeopt.simulate.litert_net import LitertNet
from edgeopt_converters import path as conversion
from edgeopt_converters.model import Model
from edgeopt_converters.onnx_file import load_onnx
from edgeopt_profiles.profile import Scheme

pytestmark = pytest.mark.slow  # nets are trained and lowered first
pytest.importorskip("ai_edge_quantizer")

SHARE = 0.999
SCHEMES = {
    "u8s8": Scheme("uint8", "int8", True, False),
    "u8s8-safe": Scheme("uint8", "int8", True, False, pair_safe=True),
    "s8s8": Scheme("int8", "int8", True, False),
    "tensorrt": Scheme("int8", "int8", True, True),
}
SAMPLES = {"resnet8": 20, "keyword-spotter": 20, "hard-swish": 20, "efficientnet-lite0": 2}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", params=SAMPLES)
def net(request: Any, tmp_path_factory: Any) -> Any:
    """(name, float ONNX model, samples that calibrate, samples that were not seen)."""
    if not os.environ.get("EDGEOPT_DATA"):
        pytest.skip("EDGEOPT_DATA names no folder with data")
    sys.path.append(str(BENCHMARKS))
    folder = tmp_path_factory.mktemp(request.param)
    made = {"hard-swish": _hard_swish, "efficientnet-lite0": _lite0}.get(request.param, _benchmark)
    model, calibration, others = made(request.param, folder)
    name = model.inputs[0].name
    return SimpleNamespace(
        name=request.param,
        model=fuse_operators.apply(model, Order()).model,
        calibration=[{name: x} for x in calibration[:48]],
        samples=[{name: x} for x in others[: SAMPLES[request.param]]],
    )


def _benchmark(name: str, folder: Path) -> tuple[Model, np.ndarray, np.ndarray]:
    from models import Place, keyword_spotter, resnet8

    place = Place(name, folder, folder / "cache")
    {"resnet8": resnet8, "keyword-spotter": keyword_spotter}[name].prepare(place)
    model = load_onnx(folder / "model.onnx", name=name)
    key = model.inputs[0].name
    return model, np.load(folder / "calibration.npz")[key], np.load(folder / "evaluation.npz")[key]


def _hard_swish(_name: str, folder: Path) -> tuple[Model, np.ndarray, np.ndarray]:
    import collapsing_net
    import torch

    data = collapsing_net.load_data(Path(os.environ["EDGEOPT_DATA"]) / "cifar10", limit=2000)
    net = collapsing_net.train(data, epochs=1)
    return _exported(net, torch.zeros(1, 3, 32, 32), folder), data.train_x[:, None], data.test_x[:, None]


def _lite0(_name: str, folder: Path) -> tuple[Model, np.ndarray, np.ndarray]:
    from edgeopt.demo.model import PREPROCESS, efficientnet_lite0
    from edgeopt.evaluate.preprocess import Preprocess
    from edgeopt.evaluate.samples import load_samples

    made = efficientnet_lite0()
    model = _exported(made.module, made.example_inputs[0], folder)
    photos = load_samples(
        str(Path(os.environ["EDGEOPT_DATA"]) / "imagenet1k-sample"),
        model.inputs,
        Preprocess.from_mapping(PREPROCESS),
        limit=20,
        seed=0,
    )
    images = np.stack([sample.inputs[model.inputs[0].name] for sample in photos])
    return model, images[:16], images[16:]


def _exported(module: Any, example: Any, folder: Path) -> Model:
    from edgeopt.sources.torch_factory import TorchModel, export

    model = conversion.convert(export(TorchModel(module, (example,)), "net", "net").model, "onnx")
    onnx.save(model.program, folder / "model.onnx")
    return model


def _respelled(model: Model, bound: float) -> Model:
    """Hard gates as a build spells them; left in floats, a value now and then rounds to the other side."""
    options = respell_operators.Options(hard_gates=True, gate_bound=bound)
    return respell_operators.apply(model, Order(options=options)).model


@pytest.mark.parametrize(
    ("scheme", "native"),
    [("u8s8", False), ("u8s8-safe", False), ("s8s8", True), ("tensorrt", True), ("s8s8", False)],
)
def test_onnx_runtime(net: Any, scheme: str, native: bool) -> None:
    """Where a residual's int8 tensor is read twice, x86 computes in floats: then only the pieces are claimed."""
    order = Order(SCHEMES[scheme], Calibration("minmax"), net.calibration)
    program = quantize_static.apply(_respelled(net.model, 1.0), order).model.program
    found = check_onnx(program, net.samples, native_int8=native)
    assert min(entry.near_share for entry in found.pieces) >= SHARE, found.pieces
    if scheme != "s8s8" or native:
        assert total(found.outputs).near_share >= SHARE, found.sentences()


def test_litert(net: Any) -> None:
    lowered = conversion.convert(_respelled(net.model, 6.0), "litert")
    name, shape = lowered.inputs[0].name, lowered.inputs[0].shape

    def turned(samples: Any) -> list[np.ndarray]:
        arrays = [next(iter(sample.values())) for sample in samples]
        return [x if x.shape == shape else np.ascontiguousarray(x.transpose(0, 2, 3, 1)) for x in arrays]

    samples = [{name: x} for x in turned(net.calibration)]
    order = Order(Scheme("int8", "int8", True, False), Calibration("minmax"), samples)
    program = quantize_litert.apply(lowered, order).model.program
    (given,) = LitertNet(program).inputs
    found = check_litert(program, [{given: x} for x in turned(net.samples)])
    assert min(entry.near_share for entry in found.pieces) >= SHARE, found.pieces
    assert total(found.outputs).near_share >= SHARE, found.sentences()
