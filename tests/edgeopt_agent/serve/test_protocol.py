# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol v2 as its text says it, asked with plain bytes; a real tritonclient asks next door."""

import json
from typing import Any

import numpy as np
import pytest

from edgeopt_wire.errors import RuntimeFailure

Rig = Any
ONES = np.ones((1, 2, 4, 4), np.float32)


def ask(
    rig: Rig, method: str, path: str, document: Any = None, binary: bytes = b"", **headers: str
) -> tuple[int, Any]:
    raw = b"" if document is None else json.dumps(document).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(raw) + len(binary)}"]
    if binary:
        lines.append(f"Inference-Header-Content-Length: {len(raw)}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    answer = rig.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + raw + binary)
    head, content = answer.split(b"\r\n\r\n", 1)
    mark = b"Inference-Header-Content-Length: "
    split = int(head.split(mark)[1].split(b"\r\n")[0]) if mark in head else len(content)
    return int(head.split()[1]), json.loads(content[:split]) if content else None


def request(**changes: Any) -> dict[str, Any]:
    return {
        "inputs": [
            {"name": "image", "datatype": "FP32", "shape": [1, 2, 4, 4], "data": [1.0] * 32, **changes}
        ]
    }


def infer(rig: Rig, document: Any, binary: bytes = b"") -> tuple[int, Any]:
    return ask(rig, "POST", "/v2/models/tiny/infer", document, binary)


def test_server_model_and_version_endpoints_answer_as_the_protocol_says(rig: Rig) -> None:
    rig.install(version="3")
    code, server = ask(rig, "GET", "/v2")
    assert (code, server["name"]) == (200, "edgeopt-agent")
    assert {"binary_tensor_data", "system_shared_memory"} <= set(server["extensions"])
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/tiny/ready",
        "/v2/models/tiny/versions/3/ready",
    ):
        assert ask(rig, "GET", path)[0] == 200
    for path in ("/v2/models/tiny", "/v2/models/tiny/versions/3"):
        _, found = ask(rig, "GET", path)
        assert (found["name"], found["versions"], found["platform"]) == ("tiny", ["3"], "edgeopt_null")
        assert found["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [1, 2, 4, 4]}]
        assert found["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": [1, 4]}]


def bare(rig: Rig, path: str) -> tuple[int, bytes]:
    found = rig.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return int(found.split(b" ", 2)[1]), found.partition(b"\r\n\r\n")[2]


def test_readiness_is_of_all_models_that_should_serve_and_has_no_body(rig: Rig) -> None:
    """A probe takes the status alone; why a model does not serve stands in the repository's index."""
    assert bare(rig, "/v2/health/live") == bare(rig, "/v2/health/ready") == (200, b""), "nothing is installed"
    rig.models.is_starting = True
    assert (bare(rig, "/v2/health/live")[0], bare(rig, "/v2/health/ready")) == (200, (400, b""))
    rig.models.is_starting = False
    rig.install(version="3")
    for path in ("/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/tiny/versions/3/ready"):
        assert bare(rig, path) == (200, b"")
    for path in ("/v2/models/none/ready", "/v2/models/tiny/versions/9/ready"):
        assert bare(rig, path) == (404, b"")
    assert ask(rig, "POST", "/v2/models/tiny/ready")[0] == ask(rig, "DELETE", "/v2/health/ready")[0] == 405
    with pytest.raises(RuntimeFailure):
        rig.install("other", version="7", failure="raise")
    assert bare(rig, "/v2/health/ready") == (400, b"")
    assert bare(rig, "/v2/models/other/ready") == (404, b"")
    assert bare(rig, "/v2/models/tiny/ready") == (200, b""), "one that fails takes no other along"
    with rig.client() as client:
        assert (client.is_ready(), client.is_ready("tiny"), client.is_ready("other")) == (False, True, False)
    _, index = ask(rig, "POST", "/v2/repository/index")
    states = {entry["name"]: (entry["version"], entry["state"], bool(entry["reason"])) for entry in index}
    assert states == {"tiny": ("3", "READY", False), "other": ("7", "UNAVAILABLE", True)}
    rig.install("other", version="8", slot="B")
    assert bare(rig, "/v2/health/ready") == (200, b"")
    with pytest.raises(RuntimeFailure):
        rig.install("other", version="9", failure="raise")
    assert bare(rig, "/v2/health/ready") == (200, b""), "the version before serves on"
    with pytest.raises(RuntimeFailure):
        rig.install("third", failure="raise")
    rig.models.deactivate("third")
    assert bare(rig, "/v2/health/ready") == (200, b""), "what was removed should not serve"


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/v2/models/none", 404),
        ("POST", "/v2/models/none/infer", 404),
        ("POST", "/v2/models/tiny/versions/9/infer", 404),
        ("GET", "/v1/models", 404),
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models/tiny/nothing", 404),
        ("GET", "/v2/models/tiny/infer", 405),
        ("POST", "/v2/models/tiny", 405),
        ("DELETE", "/v2", 405),
        ("POST", "/v2/repository/models/tiny/unload", 403),
        ("POST", "/v2/cudasharedmemory/region/r/register", 501),
        ("GET", "/v2/systemsharedmemory/region/none/status", 404),
    ],
)
def test_what_is_not_there_has_its_status_and_an_error_text(
    rig: Rig, method: str, path: str, code: int
) -> None:
    rig.install()
    found = ask(rig, method, path)
    assert found[0] == code
    assert found[1]["error"]


def test_json_in_json_out_with_the_callers_id(rig: Rig) -> None:
    rig.install(gain=2.0)
    code, found = infer(rig, {**request(), "id": "abc"})
    assert code == 200
    assert (found["model_name"], found["model_version"], found["id"]) == ("tiny", "1", "abc")
    assert found["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": [1, 4], "data": [2.0] * 4}]
    nested = request(data=ONES.tolist())
    assert infer(rig, nested)[1]["outputs"][0]["data"] == [2.0] * 4


def test_binary_in_and_out_by_request_or_by_output(rig: Rig) -> None:
    rig.install()
    entry = {
        "name": "image",
        "datatype": "FP32",
        "shape": [1, 2, 4, 4],
        "parameters": {"binary_data_size": 128},
    }
    for more, is_binary in (
        ({}, False),
        ({"parameters": {"binary_data_output": True}}, True),
        ({"outputs": [{"name": "scores", "parameters": {"binary_data": True}}]}, True),
        ({"outputs": [{"name": "scores", "parameters": {"binary_data": False}}]}, False),
    ):
        code, found = infer(rig, {"inputs": [entry], **more}, ONES.tobytes())
        assert code == 200, found
        output = found["outputs"][0]
        assert (output.get("parameters") == {"binary_data_size": 16}) == is_binary
        assert ("data" in output) != is_binary


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "object"),
        ({}, "inputs"),
        ({"inputs": [1]}, "inputs"),
        ({"inputs": []}, "missing"),
        (request(name="other"), "unknown"),
        ({"inputs": request()["inputs"] * 2}, "twice"),
        (request(datatype="INT8"), "datatype"),
        (request(shape=[2, 2, 4, 4], data=[1.0] * 64), "shape"),
        (request(shape=[1, 2, 4, -4]), "shape"),
        (request(shape=[True, 2, 4, 4]), "shape"),
        (request(data=[1.0] * 31), "data"),
        (request(data=["x"] * 32), "data"),
        (request(data=None), "data"),
        (request(parameters={"binary_data_size": 128}), "binary_data_size"),
        (request(parameters={"binary_data_size": -1}), "binary_data_size"),
        (request(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 128}), "region"),
        ({**request(), "parameters": {"sequence_id": 7}}, "sequence"),
        ({**request(), "parameters": {"priority": -1}}, "priority"),
        ({**request(), "parameters": {"timeout": 1.5}}, "timeout"),
        ({**request(), "outputs": [{"name": "other"}]}, "other"),
        (request(datatype="BYTES", shape=[1], data=["hello"]), "does not say how"),
    ],
)  # fmt: skip
def test_a_request_that_does_not_fit_is_refused_with_the_reason(rig: Rig, document: Any, says: str) -> None:
    rig.install()
    code, found = infer(rig, document)
    assert code in (400, 404), found
    assert says in found["error"]


def test_a_wrong_shape_of_as_many_values_is_refused(rig: Rig) -> None:
    rig.install()
    code, found = infer(rig, request(shape=[1, 4, 2, 4]))
    assert code == 400
    assert "(1, 2, 4, 4)" in found["error"]


def test_bytes_that_no_tensor_asks_for_are_refused(rig: Rig) -> None:
    rig.install()
    code, found = infer(rig, request(), b"1234")
    assert code == 400
    assert "4 bytes follow" in found["error"]


def test_deep_json_is_refused(rig: Rig) -> None:
    rig.install()
    raw = b"[" * 200_000
    found = rig.raw(
        b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw
    )
    assert b" 400 " in found.split(b"\r\n")[0]


def test_nan_is_given_in_binary_and_refused_in_json(rig: Rig) -> None:
    rig.install(failure="nan")
    code, found = infer(rig, request())
    assert code == 400
    assert "binary_data" in found["error"]
    with rig.client() as client:
        assert np.isnan(client.infer("tiny", {"image": ONES}).outputs["scores"]).all()


def test_a_runtime_that_fails_is_500_and_the_next_request_is_answered(rig: Rig) -> None:
    rig.install(failure="raise", fail_after=2)
    assert infer(rig, request())[0] == 200
    assert infer(rig, request())[0] == 500
    rig.install(version="2", slot="B")
    assert infer(rig, request())[0] == 200


def test_classification_gives_score_index_and_label_best_first(rig: Rig) -> None:
    rig.install(changes={"labels": "labels.txt"}, files={"labels.txt": "a\nb\nc\nd\n"})
    image = np.repeat(np.float32([1, 9, 5, 3]), 8).reshape(1, 2, 4, 4)
    document = {**request(data=image.reshape(-1).tolist())}
    document["outputs"] = [{"name": "scores", "parameters": {"classification": 2}}]
    _, found = infer(rig, document)
    assert found["outputs"][0] == {
        "name": "scores", "datatype": "BYTES", "shape": [1, 2], "data": ["9.000000:1:b", "5.000000:2:c"],
    }  # fmt: skip


def test_statistics_and_configuration_tell_what_was_done(rig: Rig) -> None:
    rig.install(serving={"instances": 2, "queue": 3})
    for _ in range(3):
        infer(rig, request())
    _, found = ask(rig, "GET", "/v2/models/tiny/stats")
    entry = found["model_stats"][0]
    assert (entry["inference_count"], entry["execution_count"]) == (3, 3)
    assert entry["inference_stats"]["compute_infer"]["ns"] > 0
    _, config = ask(rig, "GET", "/v2/models/tiny/config")
    assert config["instance_group"] == [{"count": 2}]
    assert config["input"] == [{"name": "image", "data_type": "TYPE_FP32", "dims": [1, 2, 4, 4]}]
    assert ask(rig, "POST", "/v2/repository/index", {})[1] == [
        {"name": "tiny", "version": "1", "state": "READY", "reason": ""}
    ]
