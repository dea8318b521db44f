"""What the migration pages define, against numbers that the other libraries wrote.

The functions are taken from the pages themselves, so that what a reader copies is what is compared.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.docs.test_pages import ROOT, _blocks
from tests.golden import migration_cases, torch_cases

#: Largest difference of a parameter (all about 1); a step moves each by more than 1e-3.
ATOL = 2e-6


@functools.cache
def page(name: str, blocks: int | None = None) -> dict[str, Any]:
    """Returns what the first blocks of a page define."""
    path = ROOT / "docs" / "migration" / f"{name}.md"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in _blocks(path)[:blocks]:
        exec(compile("\n" * line + code, str(path), "exec"), namespace)
    return namespace


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *outer, last = path.split("/")
        node = tree
        for name in outer:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def to_flax(x: np.ndarray) -> jax.Array:
    """`(out, in, ...)` as `(..., in, out)`."""
    if x.ndim == 4:
        return jnp.asarray(x.transpose(2, 3, 1, 0))
    return jnp.asarray(x.T)


def to_torch(x: jax.Array) -> np.ndarray:
    array = np.asarray(x)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def trajectory(
    tx: optax.GradientTransformation,
    first: dict[str, np.ndarray],
    gradients: list[dict[str, np.ndarray]],
) -> list[dict[str, np.ndarray]]:
    """Returns the parameters after every step, by name and in torch's layout."""

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params: Any = nested({name: to_flax(value) for name, value in first.items()})
    state = tx.init(params)
    steps = []
    for gradient in gradients:
        converted = nested({name: to_flax(value) for name, value in gradient.items()})
        params, state = step(converted, state, params)
        leaves = jax.tree.leaves_with_path(params)
        steps.append(
            {jax.tree_util.keystr(p, simple=True, separator="/"): to_torch(x) for p, x in leaves}
        )
    return steps


def assert_same(
    actual: list[dict[str, np.ndarray]],
    expected: dict[str, np.ndarray],
    first: dict[str, np.ndarray],
    atol: float = ATOL,
) -> None:
    for name, values in expected.items():
        before = first[name]
        for step, value in enumerate(values):
            # The bound means nothing unless the step is far larger than it.
            assert np.abs(value - before).max() > 100 * ATOL, name
            np.testing.assert_allclose(
                actual[step][name], value, rtol=0, atol=atol, err_msg=f"{name}, step {step + 1}"
            )
            before = value


def test_groups_walk_as_those_of_muon_with_aux_adam():
    first, gradients = migration_cases.problem()
    rules = mc.MatrixRules([("conv$", mc.MatrixSpec(((0, 1, 2), 3)))])
    tx = page("keller-jordan", 1)["muon_with_aux_adam"](migration_cases.GROUPS, rules)
    with np.load(migration_cases.GOLDENS) as file:
        expected = {name: file[f"groups/{name}"] for name in migration_cases.SHAPES}
    assert_same(trajectory(tx, first, gradients), expected, first)


def test_a_leaf_of_no_group_or_of_two_is_named():
    make = page("keller-jordan", 1)["muon_with_aux_adam"]
    groups = {"a": {"pattern": "w", "use_muon": True}, "b": {"pattern": "w$", "use_muon": False}}
    for name, found in (("w", "'a', 'b'"), ("x", "")):
        message = rf"^{name} belongs to the groups \[{found}\]"
        with pytest.raises(ValueError, match=message):
            make(groups).init({name: jnp.ones((2, 2))})


@pytest.mark.parametrize(
    "case",
    [case for case in torch_cases.CASES if not case.as_shipped],
    ids=lambda case: case.key,
)
def test_the_chain_for_torch_walks_as_torch(case: torch_cases.Case):
    first, gradients = torch_cases.problem()
    tx = page("torch", 1)["torch_muon"](
        torch_cases.LEARNING_RATE,
        torch_cases.WEIGHT_DECAY,
        torch_cases.MOMENTUM,
        nesterov=case.nesterov,
        adjust_lr_fn=case.adjust_lr_fn,
        ns_dtype=jnp.float32,
    )
    with np.load(torch_cases.GOLDENS) as file:
        expected = {name: file[f"{case.key}/{name}"] for name in torch_cases.SHAPES}
    assert_same(trajectory(tx, first, gradients), expected, first)


@pytest.mark.parametrize("mode", ["mha", "mla"])
def test_maxima_by_path_clip_as_lists_of_lists_did(mode: str):
    names = {
        "mha": {"w_q": "q_proj", "w_k": "k_proj"},
        "mla": {"w_q": "q_nope", "w_k": "k_nope", "w_r": "q_rope"},
    }[mode]
    layers = migration_cases.attention()
    params: Any = {
        f"layer_{i}": {
            "self_attn": {ours: {"kernel": to_flax(layer[w])} for w, ours in names.items()}
        }
        for i, layer in enumerate(layers)
    }
    if mode == "mla":
        shared = {"kernel": jnp.ones((migration_cases.WIDTH, migration_cases.HEAD_DIM))}
        for block in params.values():
            block["self_attn"]["k_rope"] = shared
    paths = [f"layer_{i}/self_attn" for i in range(len(layers))]
    maxima = page("efficient-muonclip", 1)["from_s_max"](migration_cases.S_MAX, paths)
    clipped, info = mc.apply_qk_clip(params, maxima, threshold=migration_cases.TAU)
    assert int(info.total_clipped) == sum(s > 100 for heads in migration_cases.S_MAX for s in heads)
    with np.load(migration_cases.GOLDENS) as file:
        for i, layer in enumerate(layers):
            for w, ours in names.items():
                expected = file[f"{mode}/{i}/{w}"]
                assert np.abs(expected - layer[w]).max() > 1e-3
                np.testing.assert_allclose(
                    to_torch(clipped[f"layer_{i}"]["self_attn"][ours]["kernel"]),
                    expected,
                    rtol=1e-6,  # it adds 1e-6 to the maximum
                    atol=0,
                )


def test_a_list_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 layers, and 1 paths"):
        page("efficient-muonclip", 1)["from_s_max"]([[1.0], [2.0]], ["a"])


def test_muon_config_is_converted_field_by_field():
    convert = page("gad-cell")["from_muon_config"]
    fields = {
        "unified_lr": True,
        "lr": 2e-3,
        "muon_beta": 0.9,
        "muon_decay": 0.2,
        "adam_decay": 0.3,
        "ns_steps": 6,
        "adam_betas": (0.8, 0.97),
        "adam_eps": 1e-9,
        "enable_clipping": True,
        "clipping_layers_mapping": {"q_proj": "wq", "k_proj": "wk"},
        "clipping_threshold": 30.0,
        "clipping_alpha": 0.25,
        "log_max_logits": True,
        "log_dir": "",
        "cans_ortho": False,
        "estimate_lower_bound": False,
    }
    config = convert(fields, head_dim=16, divided_by="sqrt(head_dim)")
    assert (config.learning_rate, config.adam_learning_rate) == (2e-3, None)
    assert (config.beta, config.ns_steps, config.consistent_rms) == (0.9, 6, 0.4)
    assert (config.weight_decay, config.adam_weight_decay) == (0.2, 0.3)
    assert (config.adam_b1, config.adam_b2, config.adam_eps) == (0.8, 0.97, 1e-9)
    assert (config.qk_clip_threshold, config.qk_clip_alpha) == (30.0, 0.25)
    kernel = {"kernel": jnp.ones((8, 8))}
    params = {"attn": {"wq": kernel, "wk": kernel}}
    tx = config.build()
    updates, _ = tx.update(
        params, tx.init(params), params, max_logits={"attn": jnp.asarray([300.0, 1.0])}
    )
    assert np.isfinite(updates["attn"]["wq"]["kernel"]).all()
    assert convert({"lr": 1e-3, "enable_clipping": False}, 16).qk_clip_threshold is None
    assert convert({"lr": 1e-3}, 16).qk_clip_threshold == 200.0
    with pytest.raises(ValueError, match="muon_lr"):
        convert({"lr": 1e-3, "muon_lr": 1e-3}, 16)
    with pytest.raises(ValueError, match=r"needs \['lr_muon', 'lr_adam'\]"):
        convert({"lr": 1e-3, "unified_lr": False}, 16)
    with pytest.raises(ValueError, match="ns_coeffs='cans'"):
        convert({"lr": 1e-3, "cans_ortho": True}, 16)


def test_every_page_is_in_the_index():
    folder = ROOT / "docs" / "migration"
    listed = set(re.findall(r"\]\((\S+?\.md)\)", (folder / "index.md").read_text()))
    assert listed == {path.name for path in folder.glob("*.md")} - {"index.md"}
