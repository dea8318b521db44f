"""The axes of stacked layers, read from the stack."""

import time

import jax
import jax.numpy as jnp
import optax
import pytest

import muonclip_jax as mc
from muonclip_jax._specs import normalized_axes
from muonclip_jax.routing import MatrixRules, infer_dimension_numbers
from tests.routing.test_table import tree


def insert(shape, axis, length):
    at = axis if axis >= 0 else len(shape) + 1 + axis
    return (*shape[:at], length, *shape[at:])


def stack(name, axis, layers=3, d=48, heads=6, size=8, hidden=80):
    """A block, as `nn.scan` stacks it on a parameter axis; None for one layer without it."""
    shapes = {
        "attn/query/kernel": (d, heads, size),
        "attn/key/kernel": (d, heads, size),
        "attn/out/kernel": (heads, size, d),
        "mlp/wi/kernel": (d, hidden),
        "mlp/wo/kernel": (hidden, d),
    }
    return {
        f"{name}/{path}": shape if axis is None else insert(shape, axis, layers)
        for path, shape in shapes.items()
    }


def batch_axes(shapes, rules=None):
    """Path -> axes that are no part of a matrix."""
    decided = (rules or MatrixRules()).decisions(tree(shapes))
    return {
        path: tuple(
            axis
            for axis in range(len(shapes[path]))
            if not any(axis in axes for axes in normalized_axes(decision.spec))
        )
        for path, _, decision in decided
        if decision.spec is not None
    }


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("layers", [3, 6, 48, 1], ids=["", "as heads", "as width", "one layer"])
def test_the_axis_is_read_from_the_stack(axis, layers):
    shapes = stack("layers", axis, layers)
    assert batch_axes(shapes) == {path: (axis % len(shape),) for path, shape in shapes.items()}


@pytest.mark.parametrize(
    "stacks",
    [
        {"encoder/layers": (0, 3), "decoder/layers": (1, 5)},
        {"decoder/layers": (1, 3), "decoder/remainder": (None, 3)},
        {"Transformer/encoderblock": (0, 3)},
    ],
    ids=["every stack has its own axis", "layers beside a stack", "a name that does not tell"],
)
def test_trees_of_stacks(stacks):
    shapes, expected = {}, {}
    for name, (axis, layers) in stacks.items():
        shapes |= stack(name, axis, layers)
        expected |= dict.fromkeys(stack(name, axis, layers), () if axis is None else (axis,))
    assert batch_axes(shapes) == expected


@pytest.mark.parametrize("axes", [(0, 1), (1, 2)])
def test_nested_scans(axes):
    local = stack("layers/local_layers", axes[0], layers=2)
    shapes = stack("layers/global_layer", axes[0], layers=2)
    shapes |= {path: insert(shape, axes[1], 4) for path, shape in local.items()}
    expected = {path: axes if path in local else axes[:1] for path in shapes}
    assert batch_axes(shapes) == batch_axes(shapes, MatrixRules(scan_axis=axes[0])) == expected
    by_head = batch_axes(shapes, MatrixRules(attention="per_head"))
    path = "layers/local_layers/attn/query/kernel"
    assert set(by_head[path]) > set(axes)
    assert len(by_head[path]) == 3


@pytest.mark.parametrize(
    ("shapes", "batch"),
    [
        # A length of one kernel is by chance the number of layers of another.
        ({"conv_0/kernel": (3, 2, 8, 2), "layers/w1/kernel": (6, 8, 8)}, {"conv_0/kernel": ()}),
        ({"a/query/kernel": (8, 8, 4), "layers/w1/kernel": (6, 8, 8)}, {"a/query/kernel": ()}),
        # What is beside a stack says nothing of it, whose projections might have heads.
        (
            {f"layers/{x}_proj/kernel": (5, 48, 48) for x in "qo"} | {"x/up/kernel": (48, 80)},
            {"layers/q_proj/kernel": (0,), "x/up/kernel": ()},
        ),
        # A layer without a number, whose projections might have heads by their rank alone.
        (
            {
                "layer/query/kernel": (5, 48, 48),
                "layer/up/kernel": (5, 48, 80),
                "layer/down/kernel": (5, 80, 48),
            },
            {"layer/query/kernel": (0,), "layer/up/kernel": (0,)},
        ),
        # A kernel beside a stack is read as the stack.
        (
            stack("layers", 1) | {"layers/extra/up/kernel": (48, 3, 20)},
            {"layers/extra/up/kernel": (1,)},
        ),
        # Vectors are no evidence.
        (
            stack("layers", 1)
            | {"layers/norm/scale": (3, 48), "layers/attn/query/bias": (3, 6, 8)},
            {"layers/mlp/wi/kernel": (1,)},
        ),
    ],
)
def test_what_is_evidence(shapes, batch):
    assert batch.items() <= batch_axes(shapes).items()
    with pytest.raises(ValueError, match="scan_axis="):
        batch_axes({"layers_0/dense/kernel": (8, 8, 4), "layers_2/dense/kernel": (3, 8, 8)})


@pytest.mark.parametrize(
    "shapes",
    [
        {"layers/up/kernel": (6, 8, 32)},
        {"layers/up/kernel": (48, 3, 80), "layers/wi/kernel": (48, 3, 80)},
        {"layers/w1/kernel": (8, 8, 8)},
        {"layers/dense/kernel": (8, 8, 4)},
    ],
    ids=["one kernel", "two of one shape", "a cube", "square by chance"],
)
def test_an_open_axis_is_an_error_that_names_scan_axis(shapes):
    with pytest.raises(ValueError, match=r"scan_axis=") as error:
        MatrixRules().labels(tree(shapes))
    assert all(path in str(error.value) for path in shapes)
    for scan_axis, axis in ((1, 1), ([("layers", 2)], 2)):
        found = batch_axes(shapes, MatrixRules(scan_axis=scan_axis))
        assert set(found.values()) == {(axis,)}


def test_pairs_of_pattern_and_axes_are_read_leaf_by_leaf():
    shapes = {"encoder/up/kernel": (3, 8, 8), "decoder/up/kernel": (8, 3, 8)}
    found = batch_axes(shapes, MatrixRules(scan_axis=[("encoder", 0), ("decoder", 1)]))
    assert found == {"encoder/up/kernel": (0,), "decoder/up/kernel": (1,)}
    nested = {"layers/up/kernel": (4, 2, 8, 32)}
    assert batch_axes(nested, MatrixRules(scan_axis=0)) == {"layers/up/kernel": (0, 1)}
    with pytest.raises(ValueError, match="scan_axis="):
        MatrixRules(scan_axis=5).labels(tree(shapes))


def test_muonclip_decides_on_the_whole_tree():
    """The embedding tells the axis; the masked tree that Muon sees does not have it."""
    params = {
        "embed": {"embedding": jnp.ones((20, 6))},
        "layers": {"up": {"kernel": jnp.ones((3, 6, 4))}, "wi": {"kernel": jnp.ones((3, 6, 4))}},
    }
    masked = params | {"embed": {"embedding": optax.MaskedNode()}}
    with pytest.raises(ValueError, match="scan_axis="):
        infer_dimension_numbers(masked)
    tx = mc.muonclip(1e-3, qk_clip_threshold=None)
    updates, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.usefixtures("unchecked")
def test_twelve_thousand_leaves_take_two_seconds():
    block = {
        **{f"attn/{name}/kernel": (48, 6, 8) for name in ("query", "key", "value")},
        **{f"attn/{name}/bias": (6, 8) for name in ("query", "key", "value")},
        "mlp/wi/kernel": (48, 80),
        "mlp/wo/kernel": (80, 48),
        "mlp/norm/scale": (48,),
    }
    leaves = tree({f"layers_{i}/{path}": x for i in range(1400) for path, x in block.items()})
    start = time.process_time()
    MatrixRules().decisions(leaves)
    assert time.process_time() - start < 2
