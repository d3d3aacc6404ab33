# SPDX-License-Identifier: Apache-2.0
"""What a PyTorch graph is lowered to in LiteRT: few operators, no stray Transposes, and the same values."""

import functools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from edgeopt_converters.litert_file import parse
from edgeopt_converters.litert_graph import operators, type_names
from edgeopt_converters.litert_layout import tidy
from edgeopt_converters.litert_spellings import respell
from edgeopt_converters.torch_program import program_model
from edgeopt_converters.torch_to_litert import convert

pytest.importorskip("litert_torch")
torch = pytest.importorskip("torch")

GELUS = {
    "divided": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) * 0.5,
    "multiplied": lambda x: 0.5 * x * (torch.erf(x * 0.70710678) + 1),
    "halved first": lambda x: (x * 0.5) * (torch.erf(x / 1.4142135) + 1.0),
    "divided by two": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
}
NOT_GELUS = {
    "another root": lambda x: x * (1 + torch.erf(x / math.sqrt(3))) * 0.5,
    "another tensor": lambda x: (x + 1) * (1 + torch.erf(x / math.sqrt(2))) * 0.5,
    "no half": lambda x: x * (1 + torch.erf(x / math.sqrt(2))),
    "squared": lambda x: x * (x * (1 + torch.erf(x / math.sqrt(2)))) * 0.5,
}


class Wrapped(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


class Padded(torch.nn.Module):  # type: ignore[misc]
    """Two uneven pads as TensorFlow's SAME means them, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.side = torch.nn.Conv2d(8, 8, 1, 2)
        self.down = torch.nn.Conv2d(8, 8, 3, 2)
        self.odd = torch.nn.Conv2d(8, 8, 3, 2)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.down(torch.nn.functional.pad(x, (0, 1, 0, 1))) + self.side(x))
        x = torch.relu(self.odd(torch.nn.functional.pad(x, (2, 0, 0, 1))))
        x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
        return torch.nn.functional.avg_pool2d(x, 2).flatten(1)


@functools.cache
def _padded() -> tuple[Any, bytes]:
    net = Padded().eval()
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return (net, image), convert(program_model(torch.export.export(net, (image,)), name="padded")).program


def _run(program: bytes, values: np.ndarray) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=program, num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], values)
    interpreter.invoke()
    found: np.ndarray = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return found


def _respelled(function: Any) -> tuple[Counter[str], float]:
    """The operators of a respelled function, and how far its values went."""
    x = torch.linspace(-4, 4, 64).reshape(1, 64)
    module = torch.export.export(Wrapped(function), (x,)).module()
    exact = module(x)
    respell(module)
    names = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_function")
    return names, float((module(x) - exact).abs().max())


@pytest.mark.parametrize("spelling", GELUS)
def test_a_written_out_gelu_is_one_operator(spelling: str) -> None:
    names, error = _respelled(GELUS[spelling])
    assert names == {"aten.gelu.default": 1}
    assert error < 1e-5


@pytest.mark.parametrize("spelling", NOT_GELUS)
def test_what_is_nearly_a_gelu_stays_what_it_is(spelling: str) -> None:
    names, error = _respelled(NOT_GELUS[spelling])
    assert names["aten.erf.default"] == 1
    assert error == 0


def test_padding_stays_in_the_layout_of_the_convolutions_or_becomes_theirs() -> None:
    _, program = _padded()
    found = Counter(operator.type for operator in operators(program))
    assert found["TRANSPOSE"] == 0
    assert found["PAD"] == 2  # the uneven one, and the pool's, which LiteRT's SAME does not mean
    assert found["PADV2"] == 0  # it pads with minus infinity, which no integer says


def test_values_stay_the_same() -> None:
    (net, image), program = _padded()
    with torch.no_grad():
        exact = net(image).numpy()
    found = _run(program, np.ascontiguousarray(image.permute(0, 2, 3, 1).numpy()))
    assert np.abs(found - exact).max() < 1e-5


def test_a_mean_over_the_image_has_a_grid_of_its_own() -> None:
    types = type_names(parse(_padded()[1]))
    assert "AVERAGE_POOL_2D" not in types
    assert "MEAN" in types


def test_a_tidy_file_stays_the_same_bytes() -> None:
    program = _padded()[1]
    assert tidy(program) is program


def test_max_pooling_of_negative_values_keeps_minus_infinity() -> None:
    module = torch.export.export(
        Wrapped(lambda x: torch.nn.functional.max_pool2d(x, 3, 2, 1)), (torch.randn(1, 2, 8, 8),)
    ).module()
    respell(module)
    image = -1 - torch.rand(1, 2, 8, 8)
    assert module(image).max() < 0


@pytest.mark.parametrize(
    "activation", [torch.nn.Identity(), torch.nn.ReLU()], ids=["negative too", "never negative"]
)
@pytest.mark.parametrize(
    ("size", "window", "has_pad"),
    [(8, (3, 1, 1), False), (9, (5, 2, 2), False), (9, (3, 2, 1), False), (8, (3, 2, 1), True)],
)
def test_a_max_pool_pads_by_itself_where_same_means_its_padding(
    size: int, window: tuple[int, int, int], has_pad: bool, activation: Any
) -> None:
    layer = torch.nn.Conv2d(3, 4, 1)
    image = torch.randn(1, 3, size, size) - 2
    net = Wrapped(lambda x: torch.nn.functional.max_pool2d(activation(layer(x)), *window)).eval()
    program = convert(program_model(torch.export.export(net, (image,)), name="pool")).program
    assert any(kind.startswith("PAD") for kind in type_names(parse(program))) is has_pad
    found = _run(program, image.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(found, net(image).detach().numpy(), atol=1e-5)
