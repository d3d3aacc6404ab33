# SPDX-License-Identifier: Apache-2.0
"""What the summary of speed says of our files."""

from judging import Row
from never_slower import summary, verdicts


def row(name, one, two, best=None, **more):
    ratios = {"1": one, "2": two}
    return Row(name, "onnxruntime", "ours", against_float=ratios, best_against_float=best or ratios, **more)


def listed(*rows):
    return {(v.file, v.threads): v.shipped for v in verdicts({"net": {"rows": rows}})}


def test_a_file_slower_than_float_is_marked_as_not_shipped_on_those_threads():
    found = listed(row("a", 0.5, 1.2))
    assert found == {("a", "1"): "shipped", ("a", "2"): "not shipped: the float file is"}


def test_a_median_that_the_best_run_does_not_confirm_is_noise_as_in_a_build():
    assert set(listed(row("a", 1.2, 1.02, {"1": 1.0, "2": 1.2})).values()) == {"shipped"}


def test_a_file_that_could_not_be_made_is_listed_and_one_that_does_not_apply_is_not():
    failed = Row("b", peer="ours", error="UnsupportedError: no operator Foo")
    other = Row("c", peer="ours", error="does not apply: a build makes no such file")
    assert listed(failed, other, Row("d", peer="nncf")) == {
        ("b", "1"): "not shipped: UnsupportedError: no operator Foo",
        ("b", "2"): "not shipped: UnsupportedError: no operator Foo",
    }


def test_the_summary_counts_what_is_shipped():
    lines = summary(
        {"net": {"rows": [row("a", 0.5, 1.2), row("b", 0.9, 0.9)]}, "other": {"skipped": "no data"}}
    )
    assert lines[-2:] == [
        "- onnxruntime: 4 timed, 3 shipped, 1 slower than float and not shipped",
        "- all: 4 timed, 3 shipped, 1 slower than float and not shipped",
    ]
    assert "| net | a | 2 | 1.20 | 1.20 | not shipped: the float file is |" in lines
    assert summary({"other": {"skipped": "no data"}}) == []
