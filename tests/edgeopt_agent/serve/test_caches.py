# SPDX-License-Identifier: Apache-2.0
"""What is kept for the next one who asks: when it answers, when it must not, and how little it holds."""

from typing import Any

import numpy as np
import pytest

from edgeopt_agent.serve.caches import LeastRecentlyUsed, key_of, row_keys
from edgeopt_agent.serve.semantic import SemanticIndex
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.serving import ResponseCache, SemanticCache

Rig = Any
ONES = np.ones((1, 2, 4, 4), np.float32)


def outputs(value: float, size: int = 4) -> dict[str, np.ndarray]:
    return {"y": np.full((1, size), value, np.float32)}


def test_the_least_recently_used_goes_first_by_count_and_by_bytes() -> None:
    cache = LeastRecentlyUsed(ResponseCache(entries=2))
    cache.put(b"a", outputs(1))
    cache.put(b"b", outputs(2))
    assert cache.get(b"a") is not None
    cache.put(b"c", outputs(3))
    assert [cache.get(key) is not None for key in (b"a", b"b", b"c")] == [True, False, True]
    small = LeastRecentlyUsed(ResponseCache(entries=100, size_mib=1))
    for number in range(10):
        small.put(bytes([number]), outputs(number, 2**17 // 2))
    assert small.counts()["entries"] == 4
    assert small.counts()["bytes"] == 2**20
    small.put(b"huge", outputs(0, 2**20))
    assert small.counts()["entries"] == 4, "what does not fit at all throws nothing out"


def test_an_answer_is_forgotten_when_it_is_too_old() -> None:
    seconds = [0.0]
    cache = LeastRecentlyUsed(ResponseCache(ttl_s=10), clock=lambda: seconds[0])
    cache.put(b"a", outputs(1))
    seconds[0] = 10.0
    assert cache.get(b"a") is not None
    seconds[0] = 10.1
    assert cache.get(b"a") is None
    assert cache.counts() == {"hits": 1, "misses": 1, "evicted": 0, "entries": 0, "bytes": 0}


def test_what_is_kept_is_a_copy_that_nobody_can_write_to() -> None:
    cache, given = LeastRecentlyUsed(ResponseCache()), outputs(1)
    cache.put(b"a", given)
    given["y"][...] = 9
    kept = cache.get(b"a")
    assert kept is not None
    assert kept["y"][0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        kept["y"][...] = 5


def test_requests_that_differ_in_anything_have_different_keys() -> None:
    x = np.arange(6, dtype=np.int32)
    keys = [
        key_of(given)
        for given in (
            {"a": x}, {"b": x}, {"a": x.reshape(2, 3)}, {"a": x.reshape(3, 2)}, {"a": x.view(np.float32)},
            {"a": x + 1}, {"a": [x.tobytes()]}, {"a": [b"ab", b"c"]}, {"a": [b"a", b"bc"]}, {"a": x, "b": x},
        )
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key_of({"a": x.reshape(2, 3).T}) == key_of({"a": np.ascontiguousarray(x.reshape(2, 3).T)})
    assert row_keys({"a": x.reshape(3, 2)}, 3)[1] == key_of({"a": x.reshape(3, 2)[1:2]})


def test_the_nearest_vector_answers_only_above_the_threshold() -> None:
    index = SemanticIndex(SemanticCache(threshold=0.9, entries=2))
    index.add(np.float32([1, 0]), outputs(1))
    index.add(np.float32([0, 5]), outputs(2))
    near = index.find(np.float32([0.1, 1]))
    assert near is not None
    assert near[1]["y"][0, 0] == 2
    assert near[0] == pytest.approx(1 / np.hypot(0.1, 1))
    assert index.find(np.float32([1, 1])) is None
    assert index.find(np.float32([1, 0, 0])) is None, "another length never matches"
    for vector in ([0, 0], [np.nan, 1], [np.inf, 1]):
        index.add(np.float32(vector), outputs(9))
        assert index.find(np.float32(vector)) is None
    index.add(np.float32([-1, 0]), outputs(3))
    assert index.find(np.float32([1, 0])) is None, "the least recently used row was overwritten"
    assert index.counts()["evicted"] == 1


def runs(rig: Rig, name: str = "tiny") -> int:
    return int(rig.models.served(name).scheduler.counts.runs)


def test_a_model_answers_a_known_request_from_its_cache_and_says_so(rig: Rig) -> None:
    rig.install(serving={"response_cache": {"entries": 8}})
    with rig.client() as client:
        first = client.infer("tiny", {"image": ONES})
        again = client.infer("tiny", {"image": ONES})
        fresh = client.infer("tiny", {"image": ONES}, may_cache=False)
        assert [found.parameters.get("cache") for found in (first, again, fresh)] == [None, "response", None]
        np.testing.assert_array_equal(first.outputs["scores"], again.outputs["scores"])
        assert runs(rig) == 2
        assert client.statistics("tiny")["edgeopt"]["caches"]["response"]["hits"] == 1


def test_a_new_version_never_answers_from_the_old_ones_cache(rig: Rig) -> None:
    rig.install(serving={"response_cache": {}}, gain=1.0)
    rig.models.infer("tiny", {"image": ONES})
    rig.install(serving={"response_cache": {}}, gain=2.0, version="2", slot="B")
    assert rig.models.infer("tiny", {"image": ONES})[1]["scores"][0, 0] == 2.0


def test_memory_that_changes_after_the_answer_poisons_nobody(rig: Rig) -> None:
    rig.install(serving={"response_cache": {}})
    with rig.client() as client, client.share("tiny") as shared:
        shared.inputs["image"][...] = 1
        assert shared.run()["scores"][0, 0] == 1
        shared.inputs["image"][...] = 7
        assert client.infer("tiny", {"image": ONES}).outputs["scores"][0, 0] == 1
        assert shared.run()["scores"][0, 0] == 7


def test_rows_that_are_known_are_not_embedded_again(rig: Rig) -> None:
    pytest.importorskip("onnxruntime")
    rig.install(serving={"embedding_cache": {"entries": 100}})
    images = [np.full((1, 2, 4, 4), value, np.float32) for value in (1, 2, 1)]
    found = [rig.models.infer("tiny", {"image": image})[1]["scores"][0, 0] for image in images]
    assert found == [1, 2, 1]
    assert runs(rig) == 2
    assert rig.models.served("tiny").counts()["embedding"]["hits"] == 1


def test_an_answer_by_meaning_carries_its_cosine_and_can_be_declined(rig: Rig) -> None:
    rig.install(serving={"semantic_cache": {"threshold": 0.99}})
    with rig.client() as client:
        exact = client.infer("tiny", {"image": ONES})
        close = ONES + np.float32(0.01) * (np.arange(32).reshape(ONES.shape) % 2).astype(np.float32)
        near = client.infer("tiny", {"image": close})
        assert near.parameters["cache"] == "semantic"
        assert 0.99 <= near.parameters["similarity"] <= 1
        np.testing.assert_array_equal(near.outputs["scores"], exact.outputs["scores"])
        own = client.infer("tiny", {"image": close}, may_cache=False)
        assert "cache" not in own.parameters
        assert own.outputs["scores"][0, 0] != exact.outputs["scores"][0, 0]
        far = client.infer("tiny", {"image": -ONES})
        assert "cache" not in far.parameters


def test_another_model_gives_the_vector_and_without_it_the_cache_steps_aside(rig: Rig) -> None:
    rig.install(serving={"semantic_cache": {"threshold": 0.9, "embedder": "vectors"}})
    rig.models.infer("tiny", {"image": ONES})
    assert rig.models.served("tiny").counts()["semantic"] == {
        "hits": 0, "misses": 0, "evicted": 0, "bypassed": 1, "entries": 0, "bytes": 0,
    }  # fmt: skip
    rig.install("vectors")
    rig.models.infer("tiny", {"image": ONES})
    rig.models.infer("tiny", {"image": 2 * ONES})
    assert rig.models.served("tiny").counts()["semantic"]["hits"] == 1
    assert runs(rig) == 2


def test_two_models_that_name_each_other_as_embedder_answer(rig: Rig) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        rig.install(name, serving={"semantic_cache": {"embedder": other}})
    assert rig.models.infer("a", {"image": ONES})[1]["scores"][0, 0] == 1


def test_a_semantic_cache_where_pooling_needs_the_inputs_is_refused(rig: Rig) -> None:
    with pytest.raises(RecipeError, match="embedding cache"):
        rig.install(
            serving={"semantic_cache": {}}, changes={"postprocess": {"kind": "embed", "pool": "mean"}}
        )
