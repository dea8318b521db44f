"""The text's parts share no file, and batches depend on seed and step alone."""

from pathlib import Path

import numpy as np
import pytest
from common import data


def test_every_file_is_whole_in_one_part_and_another_file_moves_none(tmp_path: Path):
    (tmp_path / "package").mkdir()
    names = [*(f"package/module_{i}.py" for i in range(80)), "another.py"]
    texts = {name: (name * 400).encode() for name in names}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    corpus = data.load_corpus([tmp_path])
    parts = {part: corpus.part(part).tobytes() for part in ("train", "validation", "held_out")}
    assert sum(map(len, parts.values())) == sum(map(len, texts.values()))
    for name, text in texts.items():
        (found,) = [part for part, joined in parts.items() if text in joined]
        assert data.part_of(name) == found  # whatever other files there are


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


def test_one_file_is_cut_by_length_and_short_text_is_refused(tmp_path: Path):
    text = bytes(range(256)) * 400
    (tmp_path / "one.txt").write_bytes(text)
    parts = data.load_corpus([tmp_path / "one.txt"])
    assert b"".join(x.tobytes() for x in (parts.train, parts.validation, parts.held_out)) == text
    (tmp_path / "one.txt").write_text("short")
    with pytest.raises(ValueError, match="less than 1024 bytes for"):
        data.load_corpus([tmp_path])
