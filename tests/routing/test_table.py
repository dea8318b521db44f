"""Leaves of known libraries by name and shape, alone in their tree, and the errors for others."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from muonclip_jax.routing import MatrixRules, MatrixSpec, normalize_spec
from tests.routing.test_trees import nest

IO = (0, 1)
QKV = (0, (1, 2))
OUT = ((0, 1), 2)

#: Path, shape, axes read and made (None: AdamW), scan_axis, and sizes of parts. `trees/` has more.
CASES: list[Any] = [
    ("Conv_0/kernel", (2, 3, 3, 8, 6), ((0, 1, 2, 3), 4)),
    ("layers/layer_1/conv/kernel", (3, 3, 16, 16), ((0, 1, 2), 3)),
    ("ConvLocal_0/kernel", (4, 18, 6), (1, 2)),
    ("ConvLocal_0/kernel", (4, 5, 18, 6), (2, 3)),
    ("depthwise_conv/kernel", (3, 1, 6), None),
    ("ConvLSTMCell_0/hh/kernel", (3, 3, 8, 32), ((0, 1, 2), 3)),
    ("transformer/layer_0/attn/qkv_einsum/w", (3, 4, 8, 2), (2, (1, 3))),
    ("transformer/layer_0/mlp/gating_einsum/w", (2, 32, 8), (2, 1)),
    ("cls/predictions/decoder/kernel", (8, 50), None),
    ("lm_head/decoder/kernel", (8, 50), None),
    ("model/layers/0/mlp/gate_up_proj/kernel", (8, 64), IO, 0, (32, 32)),
    ("model/layers/0/mlp/experts/gate_up_proj", (4, 8, 64), (1, 2), 0, (32, 32)),
    ("model/layers/0/mlp/experts/down_proj_bias", (4, 8), None),
    ("decoder/layers/self_attention/sinks", (2, 6), None, 1),
    ("decoder/layers_0/self_attention/qkv_proj/kernel", (8, 3, 2, 4), (0, (2, 3)), 1),
    ("w1", (6, 10, 10), (1, 2)),
    ("", (3, 4), IO),
    ("q", (8, 2, 4), QKV),
    ("moe/experts/gate", (4, 8, 32), (1, 2)),
    ("router/classifier/kernel", (8, 4), None),
    ("embed_proj/kernel", (4, 8), IO),
    ("mixer/D", (6, 16), None),
    ("experts/foo", (4, 8, 32), (1, 2)),
    ("blocks/0/attn/rel_pos_h", (27, 4), None),
    ("lm_head/dense/kernel", (8, 8), None),
    ("moe/w_gate", (8, 4), None),
    ("moe/experts/0/gate/kernel", (8, 4), IO),
    ("attn/q_einsum/lora_b", (6, 4, 10), None),
    ("layers/0/q_proj/lora_A/default/weight", (4, 48), None),
    ("layers/q_proj/lora_B/default/weight", (3, 48, 4), None),
    ("layers/bn/running_mean", (6, 8), None),
    ("layers/norm/g", (6, 8), None),
    # Names that leave the axes of rank three or more open.
    ("decoder/foo/w", (8, 2, 4), "refused"),
    ("DenseGeneral_0/kernel", (8, 2, 4), "refused"),
    ("layers/moe/gate", (4, 8, 32), "refused"),
    ("block_3/latent_proj/kernel", (8, 2, 4), "refused"),
    ("w", (6, 8, 8), "refused"),
]


def tree(leaves):
    return nest({path: {"shape": shape} for path, shape in leaves.items()})


def decide(path, shape, scan_axis: Any = 0):
    params = tree({path: shape}) if path else jax.ShapeDtypeStruct(shape, jnp.float32)
    return MatrixRules(scan_axis=scan_axis).decisions(params)[0][2]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}{case[1]}")
def test_leaf(case):
    path, shape, dims, *more = case
    scan_axis = more[0] if more else 0
    if dims == "refused":
        for axis in (None, 0):
            with pytest.raises(ValueError, match=re.escape(f"{path} of shape {shape}")):
                decide(path, shape, axis)
        return
    decision = decide(path, shape, scan_axis)
    for outer in ("params/", "model/"):
        assert decide((outer + path).rstrip("/"), shape, scan_axis).spec == decision.spec
    if dims is None:
        assert decision.spec is None, decision.why
        return
    assert decision.spec is not None, decision.why
    assert decision.spec.dims == normalize_spec(MatrixSpec(dims), shape).dims, decision.why
    assert [split.sizes for split in decision.spec.splits] == more[1:]


def test_the_error_lists_every_reading_once_for_each_kind_of_leaf():
    leaves = {f"block_{i}/foo": (2, 3, 4) for i in range(20)} | {"bar": (2, 3, 4)}
    with pytest.raises(ValueError, match="21 leaves of rank three") as error:
        MatrixRules().labels(tree(leaves))
    for dims in ("(0, (1, 2))", "((0, 1), 2)", "(1, 2)", "((1, 2), 0)", "(1, (0, 2))"):
        for pattern in (r'r"^block_\d+/foo$"', '"^bar$"'):
            assert f"MatrixRules([({pattern}, MatrixSpec({dims}))])" in str(error.value)
    assert str(error.value).count("MatrixSpec((0, (1, 2)))") == 2


def test_rank_below_two_is_never_muon_and_scan_axis_needs_stacked_layers():
    assert decide("Dense_0/kernel", ()).spec is decide("Dense_0/kernel", (7,)).spec is None
    assert decide("Dense_0/kernel", (8, 4), 2) == decide("Dense_0/kernel", (8, 4))
    spec = decide("layers/attention/query/kernel", (8, 2, 6, 4), -2).spec
    assert spec == MatrixSpec(((0,), (1, 3)))
