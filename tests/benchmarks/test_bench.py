# SPDX-License-Identifier: Apache-2.0
"""One whole run on a net of kilobytes, with a peer that works, one that raises and one whose process ends."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import making  # noqa: E402
import peers  # noqa: E402
import run  # noqa: E402
import running  # noqa: E402
import table  # noqa: E402
from evaluation import Evaluation  # noqa: E402
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
    monkeypatch.setattr(running, "ROUNDS", 3)
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
    return folder, About("A product", "classification", {"onnx": str(folder / "model.onnx")})


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
    rows = {
        row.name: row
        for row in run._bench("net", folder, given(folder, about), cache, making.peers_of("all"))
    }
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
    rows = run._bench("net", folder, given(folder, about), cache, making.peers_of("all"))
    found = {"net": {"description": "A product", "task": "classification", "notes": [], "rows": rows}}
    shown = [line for line in table.markdown("a machine", found).splitlines() if line.startswith("|")]
    assert len(shown) == 2 + len(rows) == 2 + 1 + len(PEERS)
    assert {line.count("|") for line in shown} == {len(table.COLUMNS) + 1}
    assert "**fails**: ValueError: no such operator / here" in "\n".join(shown)
    listed = json.loads(json.dumps(table.document("a machine", found)))["models"]["net"]["rows"]
    assert [row["name"] for row in listed] == [row.name for row in rows]


def test_what_was_made_is_kept_and_what_failed_is_tried_again(bench):
    (folder, about), cache = bench
    first = {name: making.quantize(name, "only", about, folder / CALIBRATION, cache) for name in PEERS}
    again = making.quantize("copying", "only", about, folder / CALIBRATION, cache)
    assert again == first["copying"]
    fixed = making.HERE / "peers" / "raising.py"
    fixed.write_text(fixed.read_text().replace(PEERS["raising"], PEERS["copying"]))
    assert making.quantize("raising", "only", about, folder / CALIBRATION, cache).error == ""


def test_4_bit_variants_are_tried_where_the_model_asks_for_them(monkeypatch):
    names = making.peers_of("onnxruntime")
    plain = [variant for _, variant, _ in making.variants(names)]
    assert set(plain) < {variant for _, variant, _ in making.variants(names, (4,))}
    assert not any(variant.startswith("int4") for variant in plain)


def test_an_unknown_peer_is_refused_with_those_that_are_known():
    with pytest.raises(SystemExit, match="no peer 'tensorflow'; known: ours, ai_edge_quantizer"):
        making.peers_of("tensorflow")
