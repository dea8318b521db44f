"""The convolutional example: its data, its routing, its program, and fewer steps than AdamW."""

import json
import re

import numpy as np
import pytest

from tests.examples.test_programs import ROOT, run

# The test asks for what the page claims, at the rates that `--sweep` stored.
RESULT = ROOT / "benchmarks" / "results" / "train_convnet.json"


def steps_of(table: list[str]) -> dict[str, list[float]]:
    """Each optimizer's steps to the target, a number a seed, from the printed table."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if "|" in line]
    return {
        row[0]: [float("inf" if step == "never" else step) for step in row[2].split(", ")]
        for row in rows
        if re.match(r"[\d.]+$", row[1])
    }


@pytest.mark.parametrize(
    ("losses", "expected"),
    [({3: 2.0, 4: 1.0, 5: 2.0}, None), ({3: 2.0, 4: 1.5}, 5), ({3: 1.0, 4: float("inf")}, 2)],
)
def test_the_grid_grows_where_the_best_rate_is_at_its_edge(losses, expected):
    from train_convnet import next_k

    assert next_k(losses) == expected


def test_parts_are_disjoint_and_batches_a_function_of_seed_and_step():
    from common.digits import digits_batch, load_parts

    parts = load_parts()
    assert {name: len(part.labels) for name, part in parts.items()} == {
        "train": 997,
        "validation": 300,
        "held_out": 500,
    }
    images = [image.tobytes() for part in parts.values() for image in part.images]
    assert len(set(images)) == len(images)
    batches = [
        digits_batch(parts["train"], seed=seed, step=step, batch_size=32)
        for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3))
    ]
    np.testing.assert_array_equal(batches[0].images, batches[1].images)
    np.testing.assert_array_equal(batches[0].labels, batches[1].labels)
    for other in batches[2:]:
        assert not np.array_equal(batches[0].images, other.images)


def test_a_batch_moves_an_image_by_a_pixel_at_most():
    """Against every move of every image with its label, made by rolling a padded copy."""
    from common.digits import Digits, digits_batch

    images = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    batch = digits_batch(
        Digits(images, np.arange(3, dtype=np.int32)), seed=0, step=0, batch_size=64
    )
    seen = set()
    for image, label in zip(batch.images, batch.labels, strict=True):
        padded = np.pad(images[label], ((1, 1), (1, 1), (0, 0)))
        moves = {
            (down, right): np.roll(padded, (down, right), (0, 1))[1:-1, 1:-1]
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
        }
        (move,) = [move for move, moved in moves.items() if np.array_equal(moved, image)]
        seen.add(move)
    assert len(seen) == 9


@pytest.mark.slow
def test_smoke_prints_who_trains_what_and_draws(tmp_path):
    picture, result = tmp_path / "convnet.png", tmp_path / "result.json"
    done = run("train_convnet.py", "--smoke", "--picture", picture, "--optimizers", "muon", "sgd")
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(steps_of(done.stdout.splitlines())) == {"Muon", "SGD with momentum"}
    labels = dict(re.findall(r"^(\S+) +\(.*\) +(muon|adamw)", done.stdout, re.MULTILINE))
    assert [path for path, label in labels.items() if label == "muon"] == [
        "conv_0/kernel",
        "conv_1/kernel",
        "conv_2/kernel",
    ]
    assert labels["first_conv/kernel"] == labels["head/kernel"] == "adamw"
    assert not result.exists()


def test_stored_rates_have_worse_neighbours_and_the_page_has_the_stored_table():
    stored = json.loads(RESULT.read_text())
    for found in stored["optimizers"].values():
        steps = dict(zip(found["rates"], found["steps"], strict=True))
        assert steps[found["best_rate"]] == min(steps.values())
        assert found["rates"][0] < found["best_rate"] < found["rates"][-1]
    page = (ROOT / "docs" / "examples" / "train_convnet.md").read_text()
    assert "\n".join(stored["table"]) in page


@pytest.mark.slow
def test_muon_reaches_the_target_in_fewer_steps_than_adamw_with_every_seed(tmp_path):
    chosen = ("--optimizers", "muon", "adamw", "--picture", tmp_path / "convnet.png")
    done = run("train_convnet.py", *chosen, optimized=True)
    assert done.returncode == 0, done.stderr
    steps = steps_of(done.stdout.splitlines())
    assert len(steps["Muon"]) == len(steps["AdamW"]) == 3
    assert all(muon < adamw for muon, adamw in zip(steps["Muon"], steps["AdamW"], strict=True))
