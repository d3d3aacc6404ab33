# SPDX-License-Identifier: Apache-2.0
"""The same arithmetic in other words: the output keeps its values, the runtime makes other operators of it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from edgeopt.passes import Order, respell_operators
from edgeopt_converters.model import Model
from edgeopt_wire.tensor import TensorSpec


def _block() -> Model:
    """A product, GELU as exporters write it, a residual and a layer norm."""
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.normal(size=(16, 16)) / 4, "b": rng.normal(size=16), "root2": np.array(2**0.5),
        "one": np.array(1.0), "half": np.array(0.5), "gamma": np.ones(16), "beta": np.zeros(16),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "product"), helper.make_node("Add", ["p", "b"], ["a"], "bias"),
        helper.make_node("Div", ["a", "root2"], ["d"], "div"), helper.make_node("Erf", ["d"], ["e"], "erf"),
        helper.make_node("Add", ["e", "one"], ["g"], "gate"), helper.make_node("Mul", ["half", "g"], ["h"], "halve"),
        helper.make_node("Mul", ["a", "h"], ["gelu"], "gelu"), helper.make_node("Add", ["gelu", "x"], ["r"], "residual"),
        helper.make_node("LayerNormalization", ["r", "gamma", "beta"], ["y"], "norm", axis=-1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, 16])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in tensors.items()],
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(program)
    specs = TensorSpec("x", (1, 6, 16), "float32"), TensorSpec("y", (1, 6, 16), "float32")
    return Model("onnx", program, "net", specs[:1], specs[1:])


def _run(model: Model, level: ort.GraphOptimizationLevel) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(
        model.program.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    sample = np.random.default_rng(1).normal(size=(1, 6, 16)).astype(np.float32)
    found: np.ndarray = session.run(None, {"x": sample})[0]
    return found


def _fused(model: Model, folder: Path) -> list[str]:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.program.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def test_the_runtime_fuses_gelu_and_leaves_the_layer_norm_apart(tmp_path: Path) -> None:
    before = _fused(_block(), tmp_path)
    assert "Erf" in before  # why this pass is there; if this fails, the runtime has learnt it
    assert "SkipLayerNormalization" in before
    result = respell_operators.apply(_block(), Order())
    after = _fused(result.model, tmp_path)
    assert "Erf" not in after
    assert "SkipLayerNormalization" not in after
    assert "LayerNormalization" in after
    assert result.notes == ("respelled for ONNX Runtime: 1 GELU, 1 additions before layer norms",)


def test_unfused_the_output_keeps_its_bits() -> None:
    plain = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    kept = respell_operators.apply(_block(), Order(exclude=("halve", "gelu", "residual"))).model
    respelled = respell_operators.apply(_block(), Order()).model
    np.testing.assert_array_equal(_run(respelled, plain), _run(kept, plain))
    full = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    np.testing.assert_allclose(_run(respelled, full), _run(_block(), full), rtol=1e-4, atol=1e-5)


def test_excluded_nodes_and_options_keep_the_spelling() -> None:
    excluded = respell_operators.apply(_block(), Order(exclude=("gelu", "residual")))
    assert "0 GELU, 0 additions" in excluded.notes[0]
    off = respell_operators.apply(
        _block(), Order(options=respell_operators.Options(gelu=False, layer_norm=False))
    )
    assert "0 GELU, 0 additions" in off.notes[0]


def test_the_bias_of_a_product_before_a_norm_stays_an_addition() -> None:
    model = _block()
    program = model.program
    kept = [node for node in program.graph.node if node.name in ("product", "bias", "norm")]
    kept[-1].input[0] = "a"
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del program.graph.node[:]
    program.graph.node.extend(nodes)
    result = respell_operators.apply(model, Order())
    assert "Sum" not in [node.op_type for node in result.model.program.graph.node]
