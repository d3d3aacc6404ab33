# SPDX-License-Identifier: Apache-2.0
"""At a glance: ours beside the best of the others, each with its own kind."""

from glance import HEADS, glance
from judging import Row


def row(name, sqnr_db, p50_ns, peer="peer", **more):
    more = {"runtime": "onnxruntime", "metric": "top1", "value": 0.9, "integer_share": 1.0, **more}
    return Row(
        name, peer=peer, sqnr_db=sqnr_db, p50_ns={"1": p50_ns}, against_float={"1": p50_ns / 100}, of_float=0.25, **more
    )  # fmt: skip


def cells(*rows):
    return [line.strip("| ").split(" | ") for line in glance({"net": {"rows": rows}})[2:]]


FLOAT = row("float, onnxruntime", 200.0, 100.0, peer="", value=0.95)


def test_the_most_faithful_and_the_fastest_of_the_others_stand_beside_ours():
    slow, fast = (
        row("faithful", 22.0, 60.0),
        row("fast", 15.0, 40.0, peak_bytes=3 << 20, base_bytes=1 << 20, integer_share=0.9),
    )
    ours = row("a", 25.0, 50.0, peer="ours", peak_bytes=5 << 20, base_bytes=2 << 20)
    assert cells(FLOAT, ours, slow, fast) == [[
        "net", "onnxruntime", "int8", "25.0", "22.0 (faithful; 100 % integers)", "top1 0.900 (0.950)", "0.25", "2.00",
        "1.25 (fast; 90 % integers)", "3 (2)",
    ]]  # fmt: skip


def test_a_file_is_compared_with_its_runtime_and_its_bits_only():
    ours = [row("a", 25.0, 50.0, peer="ours"), row("b", 12.0, 50.0, peer="ours", bits=4)]
    other = [
        row("c", 30.0, 9.0, runtime="litert"),
        row("d", 11.0, 25.0, bits=4),
        row("e", 40.0, 1.0, error="fails"),
    ]
    found = cells(FLOAT, *ours, *other)
    assert [(line[2], line[3], line[4], line[8]) for line in found] == [
        ("int8", "25.0", "-", "-"),
        ("int4", "12.0", "11.0 (d; 100 % integers)", "2.00 (d; 100 % integers)"),
    ]
    assert {len(line) for line in found} == {len(HEADS)}


def test_a_file_that_computes_in_floats_is_not_the_most_faithful_of_integer_files():
    ours = row("a", 25.0, 50.0, peer="ours")
    floats, half = row("floats", 40.0, 45.0, integer_share=0.0), row("half", 20.0, 60.0, integer_share=0.66)
    unread = row("unread", 21.0, 70.0, integer_share=None)
    (line,) = cells(FLOAT, ours, floats, half, unread)
    assert (line[4], line[8]) == ("21.0 (unread; integers not read)", "1.11 (floats; 0 % integers)")
    (line,) = cells(FLOAT, ours, floats, half)
    assert line[4] == "20.0 (half; 66 % integers)"


def test_where_ours_computes_little_in_integers_so_may_the_others():
    ours = row("a", 25.0, 50.0, peer="ours", integer_share=0.19)
    (line,) = cells(
        FLOAT, ours, row("none", 200.0, 60.0, integer_share=0.0), row("b", 30.0, 60.0, integer_share=0.2)
    )
    assert line[4] == "30.0 (b; 20 % integers)"


def test_weights_to_nearest_are_not_what_a_build_ships_but_a_method_of_4_bits_is():
    plain = row("a, weights to nearest", 30.0, 50.0, peer="ours")
    (one,) = cells(FLOAT, plain, row("a", 25.0, 50.0, peer="ours"))
    assert one[3] == "25.0"
    (four,) = cells(
        row("a, int4, nearest", 9.0, 50.0, peer="ours", bits=4), row("b", 8.0, 50.0, peer="ours", bits=4)
    )
    assert four[3] == "9.0"


def test_there_is_no_table_where_nothing_of_ours_was_judged():
    assert glance({"net": {"rows": [FLOAT, row("c", 30.0, 9.0)]}, "other": {"skipped": "no data"}}) == []
