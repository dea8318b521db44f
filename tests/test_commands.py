"""`python -m muonclip_jax`: what it prints about checkpoints that were really written."""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import muonclip_jax as mc
from muonclip_jax.__main__ import main
from muonclip_jax._commands import doctor
from muonclip_jax._commands.describe import find_params, read_shapes
from tests.helpers import finished

KERNEL = np.zeros((8, 2, 4), np.float32)
PARAMS = {
    "block_0": {
        "attention": {name: {"kernel": KERNEL} for name in ("query", "key", "value")},
        "mlp": {"wi": {"kernel": np.zeros((8, 32), np.float32)}},
    },
    "norm": {"scale": np.ones(8, np.float32)},
}


def forms(path: Path) -> dict[str, tuple[int, ...]]:
    return {path: form.shape for path, form in read_shapes(path).items()}


def save(folder: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def test_of_a_manager_the_newest_step_and_its_items_are_read(tmp_path: Path):
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(tmp_path / "one", options=options) as manager:
        for step, rows in ((9, 2), (10, 4)):
            item = {"params": {"w": np.ones((rows, 3))}}
            manager.save(step, args=ocp.args.StandardSave(item))
    assert forms(tmp_path / "one") == {"params/w": (4, 3)}
    assert forms(tmp_path / "one" / "9") == {"params/w": (2, 3)}
    with ocp.CheckpointManager(tmp_path / "items", options=options) as manager:
        items = {n: ocp.args.StandardSave({"w": np.ones((2, 3))}) for n in ("params", "state")}
        manager.save(1, args=ocp.args.Composite(**items))
    shapes = read_shapes(tmp_path / "items")
    assert set(shapes) == {"params/w", "state/w"}
    assert find_params(shapes)[0] == "params"


def test_no_array_is_read(tmp_path: Path):
    w = np.random.default_rng(0).standard_normal((512, 512))
    folder = save(tmp_path / "large", {"params": {"w": w}})
    files = [path for path in folder.rglob("d/*") if path.is_file()]
    large = [path for path in files if path.stat().st_size > w.nbytes / 2]
    assert large  # where the numbers are
    for path in large:
        path.unlink()
    assert forms(folder) == {"params/w": (512, 512)}


def test_boxes_are_ignored_and_npz_and_safetensors_are_read(tmp_path: Path):
    boxed = {"attention": {"value": {"kernel": {"value": KERNEL}}}}
    assert forms(save(tmp_path / "boxed", boxed)) == {"attention/value/kernel": (8, 2, 4)}
    half = np.asarray(jnp.ones((2, 2), jnp.bfloat16))
    np.savez(tmp_path / "params.npz", **{"a/kernel": KERNEL, "b/kernel": half})
    assert forms(tmp_path / "params.npz") == {"a/kernel": (8, 2, 4), "b/kernel": (2, 2)}
    assert read_shapes(tmp_path / "params.npz")["b/kernel"].dtype == jnp.bfloat16
    entry = {"dtype": "BF16", "shape": [8, 4], "data_offsets": [0, 64]}
    text = json.dumps({"__metadata__": {}, "layers.0.up_proj.weight": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    form = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)
    assert read_shapes(path) == read_shapes(tmp_path) == {"layers/0/up_proj/weight": form}


def test_what_is_no_checkpoint(tmp_path: Path, monkeypatch: Any):
    (tmp_path / "text").write_text("text")
    for path, error, message in (
        (tmp_path / "nowhere", FileNotFoundError, "There is no"),
        (tmp_path, ValueError, "not an Orbax checkpoint"),
        (tmp_path / "text", ValueError, r"neither .* numpy\.savez\('params\.npz', \*\*arrays\)"),
    ):
        with pytest.raises(error, match=message):
            read_shapes(path)
    folder = save(tmp_path / "saved", PARAMS)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match="pip install orbax-checkpoint"):
        read_shapes(folder)


FORM = jax.ShapeDtypeStruct((4, 4), jnp.float32)
COUNT = jax.ShapeDtypeStruct((), jnp.int32)


def below(root: str, tree: dict[str, Any]) -> dict[str, Any]:
    return {f"{root}/{path}": form for path, form in tree.items()}


NET = {"dense/kernel": FORM, "norm/scale": jax.ShapeDtypeStruct((4,), jnp.float32)}
ADAM = below("0/mu", NET) | below("0/nu", NET) | {"0/count": COUNT}
LAYERS = below("layer_0", NET) | below("layer_1", NET)
#: What a checkpoint without "params" holds, where its parameters are, and under which names.
ENCODER = below("encoder", NET) | {"decoder/kernel": FORM}
ROOTS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "model and opt": (below("model", NET) | below("opt", ADAM), "model", NET),
    "a counter inside": (below("net", NET | {"calls": COUNT}) | {"step": COUNT}, "net", NET),
    "several modules": (ENCODER | below("optimizer", ADAM), "", ENCODER),
    "equal layers": (LAYERS | {"step": COUNT}, "", LAYERS),
    "torch": (below("model", NET) | below("optim/exp_avg", NET), "model", NET),
}


def test_optimizer_state_is_never_taken_for_parameters():
    for name, (saved, at, params) in ROOTS.items():
        assert find_params(saved) == (at, params), name


def test_several_subtrees_of_parameters_are_asked_about():
    shapes = {"actor/params/w": FORM, "critic/params/w": FORM}
    assert find_params(shapes, "critic")[1] == {"params/w": FORM}
    assert find_params(shapes, "")[1] == shapes
    copies = below("model", NET) | below("ema", NET) | below("opt", ADAM)
    unknown = below("weights", NET) | below("s", ADAM)
    for saved, below_, message in (
        (shapes, None, "'actor/params', 'critic/params'"),
        (shapes, "model", r"nothing below 'model'.*'actor', 'critic'"),
        (copies, None, r"'model', 'ema', 'opt'.*--params"),
        (unknown, None, r"'weights', 's'.*--params"),
        (below("opt", ADAM), None, r"'opt'.*--params"),
    ):
        with pytest.raises(ValueError, match=message):
            find_params(saved, below_)


def test_the_cost_is_that_of_the_counted_products():
    form = {s: jax.ShapeDtypeStruct(s, jnp.float32) for s in ((24, 768, 768), (4, 8), (8, 4), (8,))}
    layers = {"layers/mlp/wi/kernel": form[24, 768, 768]}
    text = mc.describe_cost(layers, ns_method="standard", platform="cpu")
    # Five steps of X X^T, A A and B X, two operations a multiply-add.
    each = 5 * 3 * 2 * 768**3
    assert f"{each / 1e9:.3g} GFLOP" in text
    assert f"{24 * each / 1e9:.0f} GFLOP a step on cpu" in text
    assert f"{24 * each / (6 * 24 * 768**2):,.0f} tokens" in text
    text = mc.describe_cost({"up/kernel": form[4, 8], "down/kernel": form[8, 4]}, platform="cpu")
    assert "2 x (4, 8)" in text
    assert mc.describe_cost({"norm/scale": form[(8,)]}).endswith("no cost.")
    text = mc.describe_cost({"w": form[4, 8]}, ns_method="svd")
    assert "not counted" in text
    assert "FLOP a step" not in text


def test_describe_prints_the_three_tables_and_counts_no_optimizer_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    moments = {"0": {"mu": PARAMS, "nu": PARAMS, "count": np.zeros((), np.int32)}}
    for name in ("params", "model"):
        tree = {name: PARAMS, "opt": moments, "step": np.asarray(3)}
        folder = save(tmp_path / name, tree)
        assert main(["describe", str(folder), "--platform", "gpu"]) == 0
        printed = capsys.readouterr().out
        shapes = find_params(read_shapes(folder))[1]
        for table in (
            f"Parameters: {name!r} of {folder}",
            mc.describe_labels(PARAMS),  # the same as for the tree that was saved
            mc.describe_attention(shapes),
            mc.describe_cost(shapes, platform="gpu"),
        ):
            assert table in printed
        assert "opt/" not in printed


RULES = mc.MatrixRules([("mystery$", mc.MatrixSpec((0, (1, 2))))])


def test_describe_takes_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "params.npz"
    np.savez(path, mystery=np.zeros((4, 2, 3)))
    for rules, message in (
        ([], "mystery of shape (4, 2, 3)"),
        (["--rules", "tests"], "Write 'package.module:name'"),
        (["--rules", f"{__name__}:NOTHING"], "has no attribute 'NOTHING'"),
        (["--rules", f"{__name__}:NET"], "is a muonclip_jax.MatrixRules"),
        (["--rules", "no_such_module:RULES"], "No module named 'no_such_module'"),
    ):
        assert main(["describe", str(path), *rules]) == 1
        assert message in capsys.readouterr().err
    assert main(["describe", str(path), "--rules", f"{__name__}:RULES"]) == 0
    printed = capsys.readouterr().out
    assert "(4, 6)" in printed
    assert "nothing for QK-Clip to clip" in printed


def test_doctor_passes_here(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"jax {importlib.metadata.version('jax')} (0.9.2 or newer)" in printed
    assert "8 x cpu" in printed
    assert "1 x (768, 3072)    gram      float32" in printed
    assert "dot_product_attention: 'xla' is the default" in printed
    assert "implementation='cudnn' cannot be used: it runs on NVIDIA GPUs" in printed
    assert "FAIL" not in printed


def test_doctor_fails_where_something_is_too_old_or_breaks(monkeypatch: Any, capsys: Any):
    def broken() -> Any:
        raise RuntimeError("no backend")

    real = importlib.metadata.version
    versions = {"optax": "0.2.5", "jax": "0.8.10"}  # compared as numbers
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: versions.get(name) or real(name)
    )
    for name in ("newton_schulz", "implementations", "small_runs"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL optax 0.2.5 is too old: pip install 'optax>=0.2.6'" in printed
    assert "FAIL jax 0.8.10 is too old: pip install 'jax>=0.9.2'" in printed
    versions.clear()
    monkeypatch.setattr(doctor, "devices", broken)
    assert main(["doctor"]) == 1
    assert "FAIL RuntimeError: no backend" in capsys.readouterr().out


def test_the_module_runs_as_a_command(tmp_path: Path):
    arrays: dict[str, Any] = {"dense/kernel": np.zeros((4, 8), np.float32)}
    np.savez(tmp_path / "params.npz", **arrays)
    words = (sys.executable, "-W", "error", "-m", "muonclip_jax", "describe", "params.npz")
    result = finished(*words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "dense/kernel  (4, 8)  muon" in result.stdout
