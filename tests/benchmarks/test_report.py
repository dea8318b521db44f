"""The table of targets on made-up results: what counts as reached, and what is missing."""

import copy

import pytest

from benchmarks.harness import RESULTS as STORED, interleave, ratio, summary
from benchmarks.report import load
from benchmarks.report_quality import FAMILIES, auto_records, cost, diverging, rms_and_cosine
from benchmarks.report_targets import TARGETS, targets_table


def constant(value: float) -> dict:
    return ratio([value] * 5, [1.0] * 5)


def near(rms: float, cosine: float) -> dict:
    return {"rms": rms, "mean_cosine": cosine}


RESULTS = {
    "compile_time": {
        "ratios": [
            {"layers": 48, "contender": "ours", "over_ours": constant(1), "growth": constant(4)},
            {
                "layers": 48,
                "contender": "optax.contrib.muon",
                "over_ours": constant(11),
                "growth": constant(1),
            },
            {
                "layers": 48,
                "contender": "optax.adamw",
                "over_ours": constant(1.0),
                "growth": constant(4),
            },
            {"layers": 96, "contender": "ours", "over_ours": constant(1), "growth": constant(7)},
            {
                "layers": 96,
                "contender": "optax.adamw",
                "over_ours": constant(1),
                "growth": constant(8),
            },
        ]
    },
    "step_time": {
        "matrix_bytes": 100,
        "rows": [
            {
                "contender": "ours",
                "temporary_bytes": 20,
                "difference_from_optax": 1e-6,
                "over_ours": constant(1),
            },
            {"contender": "ours, minimax4", "quality": near(0.1, 0.99)},
            {
                "contender": "optax.contrib.muon",
                "over_ours": constant(2.5),
                "over_fast": constant(3.5),
                "temporary_bytes": 300,
                "quality": near(0.2, 0.98),
            },
            {
                "contender": "torch.optim.Muon, float32",
                "over_ours": constant(1.1),
                "over_fast": constant(1.3),
            },
        ],
        "momentum_quality": {
            "ours, minimax4": near(0.1, 0.99),
            "optax.contrib.muon": near(0.2, 0.98),
        },
    },
    "polar_time": {
        "rows": [
            {
                "contender": "ours, keller_jordan, plain",
                "products": {},
                "shape": [8, 8],
                "method": "standard",
                "whole_products_over_time": 0.96,
            },
            {
                "contender": "ours, keller_jordan, auto",
                "products": {},
                "shape": [768, 3072],
                "method": "gram",
                "whole_products_over_time": 1.1,
            },
        ]
    },
}


def lines(results: dict) -> list[str]:
    return targets_table(results).splitlines()[2:]


def test_targets_that_are_reached():
    for line, (_, _, needs, _) in zip(lines(RESULTS), TARGETS, strict=True):
        if needs in RESULTS:
            assert line.endswith("| yes |"), line
        else:
            assert "not measured: `" in line


def row(results: dict, contender: str) -> dict:
    return next(r for r in results["step_time"]["rows"] if r["contender"] == contender)


@pytest.mark.parametrize(
    ("spoil", "missed"),
    [
        (lambda r: row(r, "ours").update(difference_from_optax=1e-3), "same polynomial"),
        (lambda r: row(r, "ours").update(temporary_bytes=26), "temporary memory"),
        (
            lambda r: r["step_time"]["momentum_quality"].update(
                {"ours, minimax4": near(0.21, 0.99)}
            ),
            "better orthogonality: Optax",
        ),
        (
            lambda r: row(r, "ours, minimax4").update(quality=near(0.1, 0.97)),
            "better orthogonality: Optax",
        ),
        (
            lambda r: row(r, "torch.optim.Muon, float32").update(over_fast=constant(1.1)),
            "torch.optim.Muon",
        ),
        (
            lambda r: r["compile_time"]["ratios"][2].update(over_ours=constant(0.9)),
            "compile, 48 layers",
        ),
        (lambda r: r["compile_time"]["ratios"][3].update(growth=constant(8.1)), "growth"),
        (
            lambda r: r["polar_time"]["rows"][0].update(whole_products_over_time=0.94),
            "by XLA alone",
        ),
        (
            # Enough for a form that computes everything, not for one that saves a quarter.
            lambda r: r["polar_time"]["rows"][1].update(whole_products_over_time=0.97),
            "by XLA alone",
        ),
    ],
)
def test_targets_that_are_missed(spoil, missed):
    results = copy.deepcopy(RESULTS)
    spoil(results)
    no = [line for line in lines(results) if line.endswith("| no |")]
    assert len(no) == 1
    assert missed in no[0]


def test_a_run_that_left_something_out_says_so():
    results = copy.deepcopy(RESULTS)
    results["step_time"]["rows"] = results["step_time"]["rows"][:1]
    assert any("left out 'optax.contrib.muon'" in line for line in lines(results))


def test_contenders_take_turns_in_both_orders():
    calls: list[str] = []
    seconds = interleave({n: lambda n=n: calls.append(n) for n in "ab"}, 2, warmup=1)
    assert calls == list("baabba")
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_summaries():
    found = summary([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (found["median"], found["quartiles"], found["range"]) == (3.0, [2.0, 4.0], [1.0, 5.0])
    assert summary([2.0])["quartiles"] == [2.0, 2.0]


def test_what_the_page_says_in_words_is_what_was_measured():
    stored = load(STORED).get("polar_quality")
    if stored is None:
        pytest.skip("`make bench` has not stored the quality of coefficients")

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
    assert not any(diverging(stored, name) for name in ("keller_jordan", "minimax4", "you"))
    assert diverging(stored, "cans") == ["gram float16 (not auto)"]
    for name in ("minimax 3, from 0.01, schatten8", "minimax 3, from 0.02, schatten8"):
        assert errors(name)[-1] > errors("keller_jordan")[-1]
