"""The text's parts share no file, and its batches depend on seed and step alone."""

from pathlib import Path

import numpy as np
import pytest
from common import data


def write(folder: Path, names: list[str]) -> dict[str, bytes]:
    texts = {name: (name * 400).encode() for name in names}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return texts


def test_every_file_is_whole_in_exactly_one_part(tmp_path):
    texts = write(tmp_path, [f"package/module_{i}.py" for i in range(80)])
    corpus = data.load_corpus([tmp_path])
    parts = [corpus.train.tobytes(), corpus.validation.tobytes(), corpus.held_out.tobytes()]
    assert sum(map(len, parts)) == sum(map(len, texts.values()))
    for text in texts.values():
        assert sum(text in part for part in parts) == 1


def test_another_file_moves_none(tmp_path):
    names = [f"module_{i}.py" for i in range(80)]
    write(tmp_path, names)
    before = {name: data.part_of(name) for name in names}
    write(tmp_path, ["another.py"])
    corpus = data.load_corpus([tmp_path])
    for name in names:
        assert (name * 400).encode() in corpus.part(before[name]).tobytes()


def test_standard_library_has_all_parts_and_no_tests():
    corpus = data.load_corpus()
    assert len(corpus.train) > 10 * len(corpus.validation) > 1_000_000
    assert len(corpus.held_out) > 100_000
    folders = {part for name, _ in data._standard_library() for part in name.split("/")[:-1]}
    assert "json" in folders
    assert not folders & {"test", "tests", "site-packages"}
    again = data.load_corpus()
    assert all(
        (corpus.part(part) == again.part(part)).all()
        for part in ("train", "validation", "held_out")
    )


def test_one_file_is_cut_by_length(tmp_path):
    text = bytes(range(256)) * 400
    (tmp_path / "one.txt").write_bytes(text)
    corpus = data.load_corpus([tmp_path / "one.txt"])
    joined = corpus.train.tobytes() + corpus.validation.tobytes() + corpus.held_out.tobytes()
    assert joined == text
    assert len(corpus.train) == len(text) * 9 // 10


def test_batches_depend_on_seed_and_step_alone():
    text = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)

    def batch(seed: int, step: int) -> np.ndarray:
        return data.training_batch(text, seed=seed, step=step, batch_size=4, length=16)

    assert batch(0, 7).shape == (4, 17)
    np.testing.assert_array_equal(batch(0, 7), batch(0, 7))
    assert (batch(0, 7) != batch(0, 8)).any()
    assert (batch(0, 7) != batch(1, 7)).any()
    assert all(window.tobytes() in text.tobytes() for window in batch(0, 7))


def test_scored_windows_reach_from_end_to_end():
    text = np.arange(1000).astype(np.uint8)
    windows = data.scoring_batch(text, windows=5, length=9)
    assert windows.shape == (5, 10)
    np.testing.assert_array_equal(windows[0], text[:10])
    np.testing.assert_array_equal(windows[-1], text[-10:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [folder / "missing"], "neither a file nor a folder"),
        (lambda folder: [folder], "less than 1024 bytes for"),
    ],
)
def test_unusable_text_says_what_to_give(tmp_path, make, message):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match=message):
        data.load_corpus(make(tmp_path))


def test_unknown_part_names_those_there_are():
    with pytest.raises(ValueError, match="held_out"):
        data.load_corpus().part("test")
