# SPDX-License-Identifier: Apache-2.0
"""Bytes nobody planned: a short walk from the seeds in every run; `make fuzz` goes on for a million inputs."""

import random

import pytest
from fuzz_run import RUNS
from fuzz_targets import TARGETS, run, seeds

MUTATIONS = {"package": 300, "chunks": 300, "records": 300}
TOKENS = (
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'"',
    b"\\ud800",
    b"\xff",
    b"9" * 30,
    b"../",
    b"PK\x03\x04",
    b"\0",
    b"[" * 99,
)


def _mutate(rng: random.Random, seed: bytes) -> bytes:
    found = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(found):
            found[at] = rng.randrange(256)
        elif kind == 1:
            found[at : at + rng.randrange(8)] = rng.choice(TOKENS)
        elif kind == 2:
            del found[at : at + rng.randrange(1, 30)]
        else:
            start = rng.randrange(len(found) + 1)
            found[at:at] = found[start : start + rng.randrange(1, 40)]
    return bytes(found)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_seeds_give_an_answer_or_one_of_our_errors(name: str) -> None:
    rng, known = random.Random(0), seeds(name) or [b"seed"]
    for number in range(MUTATIONS.get(name, 1500)):
        data = _mutate(rng, known[number % len(known)])
        try:
            run(name, data)
        except Exception as error:
            raise AssertionError(f"{error!r} for {data!r}") from error


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_give_an_answer_or_one_of_our_errors(name: str) -> None:
    for data in seeds(name):
        run(name, data)


def test_a_million_inputs_are_asked_for() -> None:
    assert RUNS.keys() == TARGETS.keys()
    assert sum(RUNS.values()) >= 1_000_000
