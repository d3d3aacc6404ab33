# SPDX-License-Identifier: Apache-2.0
"""What every converter promises, whoever wrote it; a new one is tested without being listed here."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from edgeopt_converters import path
from edgeopt_converters.model import FORMATS
from edgeopt_wire import seam
from edgeopt_wire.errors import UnsupportedError

CONVERTERS = path.names()


@pytest.fixture
def tiny_model():
    """One linear layer in PyTorch, from which any source format can be made."""
    torch = pytest.importorskip("torch")
    from edgeopt_converters.torch_program import program_model

    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2).eval()
    return program_model(torch.export.export(layer, (torch.zeros(1, 3),), strict=False), name="tiny")


def test_there_are_converters():
    assert {"torch_to_onnx", "torch_to_litert", "onnx_to_torch"} <= set(CONVERTERS)


@pytest.mark.parametrize("name", CONVERTERS)
def test_name_says_source_and_target(name):
    module = seam.load("edgeopt_converters", name)
    assert name == f"{module.SOURCE}_to_{module.TARGET}"
    assert {module.SOURCE, module.TARGET} <= set(FORMATS)
    assert module.COST > 0
    assert module.EXTRA
    assert module.MODULES


@pytest.mark.parametrize("name", CONVERTERS)
def test_importing_a_converter_imports_no_framework(name):
    code = (
        f"import sys, edgeopt_converters.{name}; "
        "found = {'torch', 'onnx', 'litert_torch', 'ai_edge_litert', 'numpy'} & set(sys.modules); sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CONVERTERS)
def test_converter_keeps_name_and_edges_and_leaves_its_model_alone(name, tiny_model, capfd):
    module = seam.load("edgeopt_converters", name)
    for needed in module.MODULES:
        pytest.importorskip(needed)
    source = path.convert(tiny_model, module.SOURCE)
    before = source.program.SerializeToString() if hasattr(source.program, "SerializeToString") else None
    capfd.readouterr()
    made = module.convert(source)
    assert capfd.readouterr().out == "", "converters do not print"
    assert made.format == module.TARGET
    assert made.name == source.name
    assert [spec.shape for spec in made.inputs] == [spec.shape for spec in source.inputs]
    assert [spec.shape for spec in made.outputs] == [spec.shape for spec in source.outputs]
    assert before is None or source.program.SerializeToString() == before


def test_missing_path_lists_what_exists():
    with pytest.raises(UnsupportedError, match=r"'litert' to 'onnx'; there are: .*torch -> litert"):
        path.find("litert", "onnx")


def test_cheapest_chain_is_found_and_same_format_needs_none():
    assert path.find("onnx", "onnx") == ()
    assert [step.TARGET for step in path.find("onnx", "litert")] == ["torch", "litert"]


def test_missing_extra_is_named_before_any_work_is_done(tiny_model, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "litert_torch" else found(name, *rest),
    )
    with pytest.raises(UnsupportedError, match=r"needs litert_torch: pip install 'edgeopt\[litert\]'"):
        path.convert(tiny_model, "litert")


def test_operator_without_onnx_form_is_named():
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from edgeopt_converters.torch_program import program_model

    class Bessel(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    model = program_model(torch.export.export(Bessel(), (torch.ones(3),)), name="bessel")
    with pytest.raises(UnsupportedError, match="bessel_j0"):
        path.convert(model, "onnx")


def test_nested_arguments_and_keywords_become_flat_inputs():
    torch = pytest.importorskip("torch")
    pytest.importorskip("litert_torch")
    from ai_edge_litert.interpreter import Interpreter

    from edgeopt_converters.torch_program import program_model

    class Nested(torch.nn.Module):
        def forward(self, image, rest, scale=None):
            return {"sum": image + rest["b"], "scaled": image * scale}

    image, other, scale = (np.random.default_rng(i).random((1, 2, 4, 6), np.float32) for i in range(3))
    tensors = [torch.from_numpy(array) for array in (image, other, scale)]
    program = torch.export.export(Nested(), (tensors[0], {"b": tensors[1]}), {"scale": tensors[2]})
    lowered = path.convert(program_model(program, name="nested"), "litert")
    interpreter = Interpreter(model_content=lowered.program)
    interpreter.allocate_tensors()
    for detail, array in zip(interpreter.get_input_details(), (image, other, scale), strict=True):
        interpreter.set_tensor(detail["index"], np.ascontiguousarray(array.transpose(0, 2, 3, 1)))
    interpreter.invoke()
    found = [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
    np.testing.assert_array_equal(found[0], image + other)
    np.testing.assert_array_equal(found[1], image * scale)
