# SPDX-License-Identifier: Apache-2.0
"""One whole run on a net of kilobytes, with a peer that works, one that raises and one whose process ends."""

import functools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import making  # noqa: E402
import peers  # noqa: E402
import run  # noqa: E402
import table  # noqa: E402
import timing  # noqa: E402
from evaluation import Evaluation  # noqa: E402
from judging import Row  # noqa: E402
from models import CALIBRATION, EVALUATION, About, write_samples  # noqa: E402

PEERS = {
    "copying": "import shutil\n    return shutil.copyfile(work.source('onnx'), work.output('model.onnx'))",
    "raising": "raise ValueError('no such operator | here')",
    "dying": "import os\n    os.abort()",
    "refusing": "from work import Unavailable\n    raise Unavailable('takes photos only')",
    "lying": "work.output('model.onnx').write_bytes(b'no model')\n    return work.output('model.onnx')",
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The benchmark with these peers instead of its own, and a model to try them on."""
    here = tmp_path / "bench"
    (here / "peers").mkdir(parents=True)
    for name in ("child.py", "work.py"):
        shutil.copy(Path(making.__file__).parent / name, here)
    for name, body in PEERS.items():
        source = f"VARIANTS = {{'only': '{name} peer'}}\nIMPORTS = ()\n\n\ndef make(work):\n    {body}\n"
        (here / "peers" / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, f"peers.{name}", raising=False)
    monkeypatch.setattr(peers, "__path__", [str(here / "peers")])
    monkeypatch.setattr(making, "HERE", here)
    return _prepare(tmp_path / "model"), tmp_path / "cache"


def _prepare(folder):
    folder.mkdir()
    draw = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(draw.normal(size=(5, 8)).astype(np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        "net",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 5])],
        [weight],
    )
    program = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(program, folder / "model.onnx")
    inputs = {"x": draw.normal(size=(40, 8)).astype(np.float32)}
    write_samples(folder / CALIBRATION, inputs)
    write_samples(folder / EVALUATION, inputs, draw.integers(0, 5, 40))
    about = About("A product", "classification", {"onnx": str(folder / "model.onnx")})
    about.save(folder)
    return folder, about


def given(folder, about, limit=None):
    return Evaluation.load(folder / EVALUATION, about, limit)


def test_a_first_look_takes_samples_from_everywhere(bench):
    (folder, about), _ = bench
    whole, few = given(folder, about), given(folder, about, 4)
    assert (len(whole), len(few)) == (40, 4)
    assert np.array_equal(few.arrays["x"], whole.arrays["x"][[0, 13, 26, 39]])
    assert np.array_equal(few.labels, whole.labels[[0, 13, 26, 39]])


def test_a_peer_that_crashes_is_a_row_with_what_it_said_and_the_others_are_measured(bench):
    (folder, about), cache = bench
    rows = {row.name: row for row in run.Bench("net", folder, about, cache).run(making.peers_of("all"))}
    assert rows["raising peer"].error == "ValueError: no such operator | here"
    assert "process ended with -6" in rows["dying peer"].error
    assert rows["refusing peer"].error == "does not apply: takes photos only"
    assert "onnxruntime does not run it" in rows["lying peer"].error
    copied = rows["copying peer"]
    assert (copied.error, copied.agreement, copied.sqnr_db, copied.of_float) == ("", 1.0, 200.0, 1.0)
    assert copied.low < copied.value < copied.high
    assert set(copied.p50_ns) == set(copied.against_float) == {"1", "2"}
    assert 0 < copied.build_s < copied.process_s


def test_every_row_stands_in_the_table_and_in_the_document(bench):
    (folder, about), cache = bench
    rows = run.Bench("net", folder, about, cache).run(making.peers_of("all"))
    found = {"net": {"description": "A product", "task": "classification", "notes": [], "rows": rows}}
    shown = [line for line in table.markdown("a machine", found).splitlines() if line.startswith("|")]
    assert (
        len(shown) == 2 + len(rows) == 2 + 2 + len(PEERS)
    )  # no peer here is ours, so that this is the only table
    assert {line.count("|") for line in shown} == {len(table.COLUMNS) + 1}
    assert "**fails**: ValueError: no such operator / here" in "\n".join(shown)
    listed = json.loads(json.dumps(table.document("a machine", found)))["models"]["net"]["rows"]
    assert [row["name"] for row in listed] == [row.name for row in rows]


def test_what_was_made_or_refused_is_kept_until_its_peer_changes_or_all_shall_be_fresh(bench):
    (folder, about), cache = bench
    made = functools.partial(making.quantize, about=about, calibration=folder / CALIBRATION, cache=cache)
    ways = {name: making.Variant(name, "only", name) for name in PEERS}
    first = {name: made(way) for name, way in ways.items()}
    assert made(ways["copying"]) == replace(first["copying"], kept=True)
    assert made(ways["refusing"]) == replace(first["refusing"], kept=True)
    assert not made(ways["dying"]).kept
    assert not made(ways["copying"], fresh=True).kept
    fixed = making.HERE / "peers" / "raising.py"
    fixed.write_text(fixed.read_text().replace(PEERS["raising"], PEERS["copying"]))
    assert made(ways["raising"]).error == ""


def test_a_kept_file_shows_no_wall_time():
    new = Row("a", build_s=3.25, process_s=4.5, cpu_s=5.75)
    assert [head for head, cell in table.COLUMNS if cell(new) in {"3.2", "4.5", "5.8"}] == [
        "built in s", "with imports", "processor s",
    ]  # fmt: skip
    assert [head for head, cell in table.COLUMNS if cell(replace(new, kept=True)) == "5.8"] == ["processor s"]
    assert not {"3.2", "4.5"} & {cell(replace(new, kept=True)) for _, cell in table.COLUMNS}


def test_4_bit_ways_and_peers_are_tried_where_the_model_asks_for_them(bench):
    here = making.HERE / "peers"
    (here / "int4_other.py").write_text("VARIANTS = {'plain': 'int4 by another'}\nIMPORTS = ()\n")
    (here / "mixed.py").write_text(
        "VARIANTS = {'int8': 'a', 'int4-rtn': 'b'}\nRUNTIMES = {'int8': 'openvino'}\n"
    )
    names = ["int4_other", "mixed"]
    assert [way.label for way in making.variants(names)] == ["a"]
    every = {way.label: way.runtime for way in making.variants(names, (4,))}
    assert every == {"int4 by another": "", "a": "openvino", "b": ""}


def test_one_file_that_ends_the_clock_does_not_stop_the_others(bench, monkeypatch):
    (folder, about), cache = bench

    def times(files, *_):
        if "bad" in files:
            raise RuntimeError("it was killed")
        return {label: timing.Times(2.0, 1.0) for label in files}

    monkeypatch.setattr(run, "time_files", times)
    one = run.Bench(
        "net", folder, about, cache, rows={label: Row(label) for label in ("float", "bad", "good")}
    )
    one._time_runtime("onnxruntime", dict.fromkeys(one.rows, folder), 2, {}, folder)
    assert {label: (row.error, row.p50_ns) for label, row in one.rows.items()} == {
        "float": ("", {"2": 2.0}),
        "bad": ("it was killed", {}),
        "good": ("", {"2": 2.0}),
    }


def test_tables_are_written_between_the_marks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    table.write_between(page, "all\n")
    assert page.read_text() == "all\n"
    begin, end = "<!-- memory: begin -->", "<!-- memory: end -->"
    page.write_text(f"Before\n{begin}\nold\n{end}\nAfter\n")
    for _ in range(2):
        table.write_between(page, "new\n", "memory")
        assert page.read_text() == f"Before\n{begin}\n\nnew\n\n{end}\nAfter\n"
    page.write_text(f"{end} {begin}")
    with pytest.raises(SystemExit, match="needs both"):
        table.write_between(page, "new", "memory")


def test_an_unknown_peer_is_refused_with_those_that_are_known():
    with pytest.raises(SystemExit, match="no peer 'tensorflow'; known: ours, ai_edge_quantizer"):
        making.peers_of("tensorflow")
