"""What the programs share: texts, models, the loop, and where its metrics go."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import data, program
from common.boards import open_boards
from common.model import GPT, ModelConfig
from common.moe import LatentAttention, MoEConfig
from common.records import Metrics
from common.training import OPTIMIZERS, Settings, Training
from fine_tune import saved_settings

import muonclip_jax as mc

TINY = ModelConfig(layers=1, width=16, query_heads=2, key_heads=1, hidden=16)


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


def test_a_later_byte_changes_no_earlier_logit():
    model = GPT(TINY)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 256).astype(jnp.uint8)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    before, after = (jax.jit(model.apply)(params, x) for x in (tokens, tokens.at[:, 7].add(1)))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any()


def test_the_clip_brings_latent_attention_to_its_threshold():
    sizes = {"layers": 2, "width": 16, "heads": 2, "query_latent": 12, "key_value_latent": 8}
    sizes |= {"plain": 4, "rotated": 2, "value": 6, "experts": 4, "expert_hidden": 8}
    attention = LatentAttention(MoEConfig(**sizes, dense_hidden=16))
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    params = {"attention": jax.jit(attention.init)(jax.random.key(0), x)["params"]}

    @jax.jit
    def maxima(params: Any) -> Any:
        _, sown = attention.apply({"params": params["attention"]}, x, mutable=["intermediates"])
        return {"attention": sown["intermediates"]["max_logits"][0]}

    before = maxima(params)
    threshold = 0.5 * float(before["attention"].min())
    assert threshold > 0
    clipped, info = mc.apply_qk_clip(params, before, threshold=threshold)
    assert int(info.total_clipped) == 2
    np.testing.assert_allclose(maxima(clipped)["attention"], threshold, rtol=1e-5)
    # All heads share the rotated key and the latent: they stay as they are.
    now, then = (tree["attention"]["wkv_a"]["kernel"] for tree in (clipped, params))
    np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_step_has_a_record_and_a_run_goes_on_from_any_state_to_the_same_bits(
    optimizer: str,
):
    """Bitwise: the copied state of the middle, in a second `Training`, against the whole run."""
    sizes = {"steps": 7, "batch_size": 2, "length": 8, "score_every": 3, "score_windows": 4}
    settings = Settings(**sizes, model=TINY, optimizer=optimizer, score_on="validation")
    random = np.random.default_rng(0)
    text = (random.integers(97, 123, size).astype(np.uint8) for size in (4000, 500, 500))
    corpus = data.Corpus(*text)
    training, middle, chunks = Training(settings, corpus), None, []
    for state, records in training.run(training.init()):
        chunks.append(records)
        middle = jax.tree.map(np.array, state) if middle is None else middle
    assert [len(records) for records in chunks] == [3, 3, 1]
    records = [record for chunk in chunks for record in chunk]
    assert [record["step"] for record in records] == list(range(1, 8))
    scored = [record["step"] for record in records if "validation_loss" in record]
    assert scored == [3, 6, 7]
    assert all(np.isfinite(list(record.values())).all() for record in records)
    if optimizer == "muonclip":
        again = Training(settings, corpus).run(jax.tree.map(jnp.asarray, middle))
        rest = [record for _, records in again for record in records]
        for record in records + rest:
            record.pop("tokens_per_second")
        assert records[3:] == rest


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path):
    (tmp_path / "settings.json").write_text(json.dumps({"optimizer": "muon"}))
    with pytest.raises(SystemExit, match="was trained with muon"):
        saved_settings(tmp_path)


def test_a_run_goes_to_weights_and_biases_and_goes_on_there(tmp_path: Path, monkeypatch):
    records: list[dict[str, float | int]] = [
        {"step": 1, "train_loss": 5.5, "update/rms": 0.25},
        {"step": 2, "train_loss": 4.5, "held_out_loss": 4.75},
    ]
    run, folder = mock.Mock(id="new"), tmp_path / "own"
    wandb = SimpleNamespace(init=mock.Mock(return_value=run))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder.mkdir()
    given = {"project": "muon", "name": "own", "dir": str(folder), "config": {"seed": 3}}
    parser = program.parser("own", "A program.")
    options = parser.parse_args(["--runs", str(tmp_path), "--wandb", "muon"])
    for step, last in ((0, None), (1, "new")):
        boards = open_boards(options, folder, {"seed": 3}, step=step)
        with Metrics(folder, step=step, boards=boards) as metrics:
            metrics.write(records[step:])
        wandb.init.assert_called_with(**given, id=last, resume="allow")
        logged = [{k: v for k, v in x.items() if k != "step"} for x in records[step:]]
        calls = [mock.call(x, step=i) for i, x in enumerate(logged, start=step + 1)]
        assert run.log.call_args_list == calls
        run.reset_mock()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
