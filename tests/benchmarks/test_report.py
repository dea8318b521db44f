"""What the report reads: interleaved times, their summaries, and what the page says in words."""

import json

from benchmarks.harness import RESULTS as STORED, compact, interleave, ratio, summary
from benchmarks.report import load
from benchmarks.report_quality import FAMILIES, auto_records, cost, diverging, rms_and_cosine


def test_contenders_take_turns_in_both_orders():
    calls: list[str] = []
    seconds = interleave({n: lambda n=n: calls.append(n) for n in "ab"}, 2, warmup=1)
    assert calls == list("baabba")
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_summaries_and_stored_rows_that_are_a_line_each():
    assert summary([5.0, 1.0, 2.0, 3.0]) == {"median": 2.5, "range": [1.0, 5.0]}
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == {"median": 3.0, "range": [2.0, 4.0]}
    content = {"machine": {"cores": 2}, "rows": [{"a": 1 / 3, "b": None}, {"a": [1e-9, 2]}]}
    text = compact(content | {"by name": {"x": {"a": 1}, "y": {"a": 2}}, "empty": []})
    assert len(text.splitlines()) == 12
    assert json.loads(text)["rows"] == [{"a": 0.33333333, "b": None}, {"a": [1e-9, 2]}]


def test_what_the_page_says_in_words_is_what_was_measured():
    stored = load(STORED).get("polar_quality")
    assert stored is not None

    def found(name):
        return auto_records(stored, name, "float32")

    def errors(name):
        pairs = [rms_and_cosine(found(name), family) for family in FAMILIES]
        return [pair[0] for pair in pairs if pair is not None]

    def is_nearer(name, other):
        return all(a < b for a, b in zip(errors(name), errors(other), strict=True))

    assert "momentum" in stored["families"]
    assert cost(found("minimax4")) < cost(found("keller_jordan")) == cost(found("you"))
    assert is_nearer("minimax4", "keller_jordan")
    assert is_nearer("you", "keller_jordan")
    named = ("keller_jordan", "minimax4", "you", "cans")
    assert not any(diverging(stored, name) for name in named)
    for name in ("minimax 3, from 0.01, schatten8", "minimax 3, from 0.02, schatten8"):
        assert errors(name)[-1] > errors("keller_jordan")[-1]
