# SPDX-License-Identifier: Apache-2.0
"""Topics name one device each and can hold no wildcard, whatever a device calls itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt_wire import topics
from edgeopt_wire.errors import DocumentError

PARTS = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)


@given(PARTS, PARTS, st.sampled_from(topics.UP + topics.DOWN))
def test_a_topic_is_read_back_as_it_was_made(tenant: str, device: str, what: str) -> None:
    assert topics.parse(topics.topic(tenant, device, what)) == (tenant, device, what, ())


def test_a_chunk_topic_says_which_chunk_of_which_blob() -> None:
    name = topics.chunk("default", "porch", "0123456789abcdef" * 4, 17)
    assert name == "eo/1/default/porch/chunk/0123456789abcdef/17"
    assert topics.parse(name) == ("default", "porch", "chunk", ("0123456789abcdef", "17"))


@pytest.mark.parametrize("part", ["", "+", "#", "a/b", "a b", "é", "a\n", "a\x00", "x" * 65])
def test_a_name_that_could_reach_other_topics_is_refused(part: str) -> None:
    with pytest.raises(DocumentError, match=r"device .* must match"):
        topics.topic("default", part, "reported")
    with pytest.raises(DocumentError, match=r"tenant .* must match"):
        topics.every_device(part, "reported")
    with pytest.raises(DocumentError, match="must match"):
        topics.client_id("default", part)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "eo/1/t/d",
        "eo/2/t/d/event",
        "xo/1/t/d/event",
        "eo/1/t/d/secret",
        "eo/1//d/event",
        "eo/1/t/+/event",
    ],
)
def test_a_foreign_topic_is_refused(name: str) -> None:
    with pytest.raises(DocumentError):
        topics.parse(name)


def test_topics_stay_within_the_limits_of_hosted_brokers() -> None:
    longest = topics.chunk("t" * 64, "d" * 64, "0" * 64, 10**6)
    assert longest.count("/") <= 7
    assert len(longest.encode()) <= 256


def test_an_unknown_kind_of_topic_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="no topic of ours"):
        topics.topic("default", "d", "other")


def test_the_two_directions_share_no_topic() -> None:
    assert not set(topics.UP) & set(topics.DOWN)
    assert topics.every_device("default", "event") == "eo/1/default/+/event"
