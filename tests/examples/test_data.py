"""The text's parts share no file, and batches depend on seed and step alone."""

from pathlib import Path

import numpy as np
import pytest
from common import data
from common.digits import Digits, digits_batch, load_parts


def write(folder: Path, names: list[str]) -> dict[str, bytes]:
    texts = {name: (name * 400).encode() for name in names}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return texts


def test_every_file_is_whole_in_one_part_and_another_file_moves_none(tmp_path: Path):
    texts = write(tmp_path, [f"package/module_{i}.py" for i in range(80)])
    before = {name: data.part_of(name) for name in texts}
    texts |= write(tmp_path, ["another.py"])
    corpus = data.load_corpus([tmp_path])
    parts = {part: corpus.part(part).tobytes() for part in ("train", "validation", "held_out")}
    assert sum(map(len, parts.values())) == sum(map(len, texts.values()))
    for name, text in texts.items():
        (found,) = [part for part, joined in parts.items() if text in joined]
        assert before.get(name, found) == found


def test_the_standard_library_has_all_parts_and_no_tests():
    corpus = data.load_corpus()
    assert len(corpus.train) > 10 * len(corpus.validation) > 1_000_000
    assert len(corpus.held_out) > 100_000
    assert b"class JSONDecoder" in b"".join(x.tobytes() for x in (corpus.train, corpus.held_out))
    assert b"(unittest.TestCase):\n" not in corpus.held_out.tobytes()
    np.testing.assert_array_equal(corpus.train, data.load_corpus().train)


def test_one_file_is_cut_by_length(tmp_path: Path):
    text = bytes(range(256)) * 400
    (tmp_path / "one.txt").write_bytes(text)
    corpus = data.load_corpus([tmp_path / "one.txt"])
    joined = corpus.train.tobytes() + corpus.validation.tobytes() + corpus.held_out.tobytes()
    assert joined == text
    assert len(corpus.train) == len(text) * 9 // 10


def test_text_batches_depend_on_seed_and_step_alone_and_scores_on_all_of_it():
    text = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)

    def batch(seed: int, step: int) -> np.ndarray:
        return data.training_batch(text, seed=seed, step=step, batch_size=4, length=16)

    assert batch(0, 7).shape == (4, 17)
    np.testing.assert_array_equal(batch(0, 7), batch(0, 7))
    assert (batch(0, 7) != batch(0, 8)).any()
    assert (batch(0, 7) != batch(1, 7)).any()
    assert all(window.tobytes() in text.tobytes() for window in batch(0, 7))
    windows = data.scoring_batch(text, windows=5, length=9)
    np.testing.assert_array_equal(windows[0], text[:10])
    np.testing.assert_array_equal(windows[-1], text[-10:])


def test_unusable_text_says_what_to_give(tmp_path: Path):
    (tmp_path / "short.txt").write_text("short")
    for path, message in (
        (tmp_path / "missing", "neither a file nor a folder"),
        (tmp_path, "less than 1024 bytes for"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load_corpus([path])
    with pytest.raises(ValueError, match="held_out"):
        data.Corpus(*[np.zeros(9, np.uint8)] * 3).part("test")


def test_parts_of_the_digits_are_disjoint():
    parts = load_parts()
    images = [image.tobytes() for part in parts.values() for image in part.images]
    assert {name: len(part.labels) for name, part in parts.items()} == {
        "train": 997,
        "validation": 300,
        "held_out": 500,
    }
    assert len(set(images)) == len(images)


def test_a_batch_of_digits_moves_each_image_by_a_pixel_at_most():
    """Against every move of every image with its label, made by rolling a padded copy."""
    images = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    digits = Digits(images, np.arange(3, dtype=np.int32))
    batch, again, other = (
        digits_batch(digits, seed=0, step=step, batch_size=64) for step in (0, 0, 1)
    )
    np.testing.assert_array_equal(batch.images, again.images)
    assert not np.array_equal(batch.images, other.images)
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
