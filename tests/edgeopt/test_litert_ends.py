# SPDX-License-Identifier: Apache-2.0
"""The ends of an int8 LiteRT file write floats: outputs cannot be clipped, and an average has a grid of its own or none."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt import litert_bias, litert_levels, mixed_litert
from edgeopt import litert_ends as subject
from edgeopt.artifacts import Description, Made
from edgeopt.calibrate import Calibration
from edgeopt.passes import Order, quantize_litert
from edgeopt.plan import Artifact
from edgeopt.ranges import Range
from edgeopt.recipe import Recipe
from edgeopt.search import Change
from edgeopt_converters.litert_file import pack, parse
from edgeopt_converters.litert_graph import operators, type_names
from edgeopt_converters.model import Model
from edgeopt_converters.torch_program import program_model
from edgeopt_converters.torch_to_litert import convert
from edgeopt_profiles.profile import Scheme

pytest.importorskip("ai_edge_quantizer")
pytest.importorskip("litert_torch")
torch = pytest.importorskip("torch")

INT8 = Scheme("int8", "int8", True, False)
EDGE = Scheme("int8", "int8", True, False, io="int8")


def _net(kind: str) -> Any:
    torch.manual_seed(0)
    stem = [torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU()]
    more = {
        "classifier": [torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(16, 10), torch.nn.Softmax(1)],
        "two layers": [torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Linear(8, 10)],
        "norm": [
            torch.nn.Flatten(2), torch.nn.LayerNorm(64), torch.nn.ReLU(), torch.nn.Unflatten(2, (8, 8)),
            torch.nn.Conv2d(16, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 10),
        ],
        "windows": [torch.nn.AvgPool2d(2), torch.nn.Conv2d(16, 4, 1)],
        "map": [torch.nn.Conv2d(16, 4, 1), torch.nn.Sigmoid()],
    }  # fmt: skip
    return torch.nn.Sequential(*stem, *more[kind]).eval()


@functools.cache
def _floats(kind: str) -> Model:
    exported = torch.export.export(_net(kind), (torch.zeros(1, 3, 8, 8),))
    return convert(program_model(exported, name="net"))


def _samples(scale: float = 1.0, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    name = _floats("classifier").inputs[0].name
    return [{name: (scale * rng.normal(size=(1, 8, 8, 3))).astype(np.float32)} for _ in range(24)]


@functools.cache
def _quantized(kind: str, scheme: Scheme = INT8) -> Model:
    order = Order(scheme, Calibration("minmax"), samples=_samples())
    found: Model = quantize_litert.apply(_floats(kind), order).model
    return found


def _run(model: Model, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=model.program, num_threads=1)
    interpreter.allocate_tensors()
    rows = []
    for sample in samples:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], next(iter(sample.values())))
        interpreter.invoke()
        rows.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).copy())
    return np.concatenate(rows)


def _levels(kind: str) -> list[tuple[str, str]]:
    program = _floats(kind).program
    types = {operator.name: operator.type for operator in operators(program)}
    return [(types[name], level) for name, level in subject.find_ends(program).items()]


def test_a_classifier_is_dynamic_with_floats_around_it() -> None:
    found = [entry for entry in _levels("classifier") if entry[0] != "RESHAPE"]
    assert found == [("MEAN", "fp32"), ("FULLY_CONNECTED", "dynamic"), ("SOFTMAX", "fp32")]


def test_only_the_last_of_two_layers_is_an_end() -> None:
    assert _levels("two layers") == [("FULLY_CONNECTED", "dynamic")]


def test_what_follows_a_convolution_is_an_end_and_the_convolution_is_not() -> None:
    assert {entry for entry in _levels("map") if entry[0] != "TRANSPOSE"} == {("LOGISTIC", "fp32")}


def test_an_output_beyond_everything_that_calibrated_is_not_clipped() -> None:
    """Inputs stay on their grid, and the classifier adds up what no calibration sample added up."""
    exact = _run(_floats("two layers"), _samples(0.9, seed=7))
    found = _run(_quantized("two layers"), _samples(0.9, seed=7))
    assert len(np.unique(found)) > 200  # a grid of 8 bits has 256 values and 240 outputs share them
    assert 10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum()) > 25


def test_averages_and_probabilities_cost_next_to_nothing() -> None:
    exact = _run(_floats("classifier"), _samples(seed=7))
    error = np.abs(_run(_quantized("classifier"), _samples(seed=7)) - exact)
    assert error.max() < 1 / 512  # half a step of a softmax on its grid


def test_a_device_without_floats_gets_none() -> None:
    tensors = parse(_quantized("classifier", EDGE).program).subgraphs[0].tensors
    assert not [tensor.name for tensor in tensors if tensor.type == 0]


def test_a_layer_norm_computes_in_floats_and_its_layers_in_integers() -> None:
    made = _quantized("norm")
    found = {entry.type: entry.dtype for entry in operators(made.program)}
    assert (found["RSQRT"], found["SQUARED_DIFFERENCE"], found["CONV_2D"]) == ("float32", "float32", "int8")
    exact = _run(_floats("norm"), _samples(seed=7))
    error = _run(made, _samples(seed=7)) - exact
    assert (
        10 * np.log10(np.square(exact).sum() / np.square(error).sum()) > 30
    )  # 35; 26 with the norm in integers


def test_a_report_names_what_computes_in_floats() -> None:
    order = Order(INT8, Calibration("minmax"), samples=_samples())
    (note,) = [note for note in quantize_litert.apply(_floats("norm"), order).notes if "floats" in note]
    assert "RSQRT" in note


def test_averages_far_smaller_than_what_they_read_leave_its_grid() -> None:
    program = _floats("windows").program
    (pool,) = [entry.name for entry in operators(program) if entry.type == "AVERAGE_POOL_2D"]
    (reads,) = [entry.inputs[0].name for entry in operators(program) if entry.type == "AVERAGE_POOL_2D"]
    small = {reads: Range(0.0, 6.0), pool: Range(0.0, 2.0)}
    assert subject.find_coarse_pools(program, small) == {pool: "fp32"}
    assert subject.find_coarse_pools(program, small | {pool: Range(0.0, 4.0)}) == {}


def test_levels_are_read_off_a_file_as_they_were_chosen() -> None:
    floats, made = _floats("norm").program, _quantized("norm").program
    ranges = litert_levels.read_ranges(made)
    assert litert_levels.read_levels(floats, made) == litert_levels.usual(floats, ranges)


def test_a_search_begins_with_the_file_that_was_made(tmp_path: Path) -> None:
    """Its ends, norms and corrected biases too; what is in floats already is no choice any more."""
    floats, made = _floats("norm"), _quantized("norm")
    (tmp_path / "floats").write_bytes(floats.program)
    (tmp_path / "int8").write_bytes(made.program)
    artifact = Artifact("litert-int8-int8", "litert", "int8", INT8)
    described = Description("litert", "net", made.inputs, made.outputs)
    entry = Made(artifact, tmp_path / "int8", described, base=tmp_path / "floats")
    shop = mixed_litert.open_workshop(entry, _samples(), Recipe())  # type: ignore[arg-type] - samples as they are
    exact = _run(floats, _samples(seed=7))
    first, own = (
        _run(replace(floats, program=program), _samples(seed=7)) for program in (shop.make(()), made.program)
    )
    assert np.abs(first - own).max() < 0.02 * np.abs(exact).max()
    assert {shop.operators[knob.name].type for knob in shop.knobs} >= {"CONV_2D", "FULLY_CONNECTED"}
    assert not {shop.operators[knob.name].type for knob in shop.knobs} & {"RSQRT", "SQUARED_DIFFERENCE"}
    better = [knob.name for knob in shop.knobs if shop.operators[knob.name].type == "CONV_2D"]
    raised = _run(
        replace(floats, program=shop.make(tuple(Change(name, "fp32") for name in better))), _samples(seed=7)
    )
    assert np.square(raised - exact).sum() < np.square(own - exact).sum()


def _mean_error(made: Model, seed: int) -> float:
    unseen = [sample for number in range(8) for sample in _samples(seed=seed + number)]
    error = _run(_floats("two layers"), unseen) - _run(made, unseen)
    return float(np.abs(error.mean(0)).max())


def test_a_mean_error_of_the_outputs_is_taken_into_their_bias() -> None:
    floats, made = _floats("two layers"), _quantized("two layers")
    ranges = litert_levels.read_ranges(made.program)
    ranges[floats.inputs[0].name] = Range(-4.0, 4.0)
    shifted = {name: Range(span.low / 2, span.high / 2) for name, span in ranges.items()}  # it clips, one way
    plain = litert_levels.quantize(
        floats.program, shifted, litert_levels.read_levels(floats.program, made.program)
    )
    (layer,) = [name for name, level in subject.find_ends(floats.program).items() if level == subject.DYNAMIC]
    corrected, said = litert_bias.correct(floats.program, plain, [layer], floats.inputs, _samples())
    assert "1 output layers" in said
    before, after = (_mean_error(replace(floats, program=program), 40) for program in (plain, corrected))
    assert after < before / 3


def test_a_mean_that_chance_explains_changes_nothing() -> None:
    floats, made = _floats("two layers"), _quantized("two layers").program
    (layer,) = [name for name, level in subject.find_ends(floats.program).items() if level == subject.DYNAMIC]
    few = _samples()[: litert_bias.LEAST_SAMPLES - 1]
    assert litert_bias.correct(floats.program, made, [layer], floats.inputs, few) == (made, "")


def test_runtimes_that_would_take_one_channels_scale_for_all_are_told_not_to_load_the_file() -> None:
    model = parse(_quantized("classifier").program)
    graph = model.subgraphs[0]
    (layer,) = [
        operator
        for operator, kind in zip(graph.operators, type_names(model), strict=True)
        if kind == "FULLY_CONNECTED"
    ]
    assert len(graph.tensors[layer.inputs[1]].quantization.scale) == 10
    assert model.operatorCodes[layer.opcodeIndex].version >= 12
    assert layer.builtinOptions.asymmetricQuantizeInputs


def test_constants_of_a_packed_file_are_aligned_and_the_same() -> None:
    """ai-edge-quantizer puts large ones behind the flatbuffer, where a parsed file has them too."""
    from ai_edge_quantizer import quantizer, recipe

    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Linear(64, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1024))
    floats = convert(
        program_model(torch.export.export(wide.eval(), (torch.zeros(1, 64),)), name="wide")
    ).program
    maker = quantizer.Quantizer(bytearray(floats), recipe.dynamic_wi8_afp32())
    written = bytes(maker.quantize(enable_progress_report=False).quantized_model)
    model = parse(written)
    large = [
        bytes(buffer.data) for buffer in model.buffers if buffer.data is not None and len(buffer.data) > 4096
    ]
    assert max(len(data) for data in large) == 1024 * 1024
    packed = pack(model)
    assert [packed.index(data) % 16 for data in large] == [0] * len(large)
    assert pack(parse(packed)) == packed
