"""Reading compiled programs: products, collectives and their groups of devices, as written."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec as P

from benchmarks.hlo import tally
from benchmarks.replica_groups import read_groups


def counted(function: Any, *shapes: tuple[int, ...]) -> Any:
    program = jax.jit(function).lower(*(jnp.zeros(shape) for shape in shapes)).compile()
    return tally(program.as_text() or "")


def test_products_loops_and_the_costliest_branch():
    assert counted(jnp.matmul, (4, 8), (8, 16)).flops == 2 * 4 * 8 * 16
    batched = counted(lambda x, y: jnp.einsum("bij,bkj->bik", x, y), (3, 4, 8), (3, 5, 8))
    assert batched.flops == 2 * 3 * 4 * 5 * 8

    loop = counted(lambda x, w: jax.lax.fori_loop(0, 7, lambda _, x: x @ w, x), (4, 8), (8, 8))
    assert (loop.flops, loop.loops, loop.unknown_loops) == (7 * 2 * 4 * 8 * 8, 1, 0)

    def branch(x, w, n):
        return jax.lax.switch(n.astype(int), [lambda: x, lambda: x @ w, lambda: x @ w @ w])

    assert counted(branch, (8, 8), (8, 8), ()).flops == 2 * 2 * 8**3


def test_collectives():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def body(x):
        x = jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.psum(x, "x"), x)
        x = jax.lax.all_gather(x, ("x", "y"), axis=0, tiled=True)
        return jax.lax.all_to_all(x, "y", split_axis=0, concat_axis=1, tiled=True)

    run = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found, size = counted(run, (2, 5)), 2 * 5 * 4
    assert found.by_kind(in_loops=True) == {
        "all-reduce": {"count": 3, "bytes": 3 * 2 * size * 3 / 4}
    }
    assert found.by_kind(in_loops=False) == {
        "all-gather": {"count": 1, "bytes": 8 * size * 7 / 8},
        "all-to-all": {"count": 1, "bytes": 8 * size / 2},
    }


TPU = """HloModule jit_f, is_scheduled=true, num_partitions=512

%fused (p: bf16[2,64,96], q: bf16[2,96,32]) -> f32[2,64,32] {
  %p = bf16[2,64,96]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[2,96,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = f32[2,64,32]{2,1,0:T(8,128)} convolution(%p, %q), window=HOLES, dim_labels=0bf_0io->0bf
}

ENTRY %main (a: bf16[2,64,96], b: bf16[2,96,32]) -> f32[2,64,32] {
  %a = bf16[2,64,96]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[2,96,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %s = (f32[8,128]{1,0}, f32[32,128]{1,0}) all-gather-start(%a), replica_groups=[128,4]<=[512]
  %d = f32[32,128]{1,0:T(8,128)} all-gather-done(%s)
  %r = f32[8,128]{1,0:T(8,128)} all-reduce(%d), replica_groups={}, to_apply=%add
  ROOT %f = f32[2,64,32]{2,1,0:T(8,128)} fusion(%a, %b), kind=kOutput, calls=%fused
}
""".replace("HOLES", "{size=2 pad=0_0 lhs_dilate=2}")


def test_what_a_tpu_writes():
    """A batched product is a convolution with holes; a start counts, its end does not."""
    found = tally(TPU)
    assert found.flops == 2 * 2 * 64 * 96 * 32
    assert found.by_kind()["all-gather"] == {"count": 1, "bytes": 32 * 128 * 4 * 3 / 4}
    assert found.by_kind()["all-reduce"]["bytes"] == pytest.approx(2 * 8 * 128 * 4 * 511 / 512)


A, B = 8 * 128 * 4, 2 * 4 * 16 * 2
STARTS = [
    ("all-to-all", "((f32[8,128], f16[2,4,16]), (f32[8,128], f16[2,4,16]))", (A + B) * 3 / 4),
    ("all-gather", "((f32[8,128], f16[2,4,16]), (f32[32,128], f16[8,4,16]))", (A + B) * 3),
    ("reduce-scatter", "((f32[8,128]{1,0}), f32[2,128]{1,0})", A / 4 * 3),
    ("all-reduce", "((f32[8,128]{1,0}), f32[8,128]{1,0}, u32[])", 2 * A * 3 / 4),
    ("collective-permute", "(f32[8,128]{1,0}, f32[8,128]{1,0}, u32[], u32[])", A),
]


def test_a_start_sends_its_results():
    """What begins and ends apart, as on a GPU, has its operands in its type too."""
    program = """HloModule jit_f, is_scheduled=true, num_partitions=4

ENTRY %main (a: f32[8,128], b: f16[2,4,16]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f16[2,4,16]{2,0,1} parameter(1)
  START
}
"""
    for kind, written, size in STARTS:
        start = f"%s = {written} {kind}-start(%a, %b), replica_groups=[1,4]<=[4]"
        found = tally(program.replace("START", start)).by_kind()
        assert found == {kind: {"count": 1, "bytes": size}}, written


ALL = tuple(range(8))
EVEN_AND_ODD = [(0, 2, 4, 6), (1, 3, 5, 7)]
HALVES = [(0, 1, 2, 3), (4, 5, 6, 7)]
ACROSS_PAIRS = [(0, 2), (1, 3), (4, 6), (5, 7)]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", EVEN_AND_ODD),
        ("{}", [ALL]),
        ("[2,4]<=[8]", HALVES),
        ("[4,2]<=[2,2,2]T(0,2,1)", ACROSS_PAIRS),
        ("mesh[x=4,y=2] {y}", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("mesh['x'=4,'y'=2] {'y','x'}", [(0, 2, 4, 6, 1, 3, 5, 7)]),
        # One program, by JAX 0.12 and by 0.10.
        ("mesh['x'=4,'y'=2] {'x':(2)2}", ACROSS_PAIRS),
        (
            "mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(0,2,1)) {'axis_1':(2)2}",
            ACROSS_PAIRS,
        ),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", HALVES),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'a'}", [(3, 0), (1, 2)]),
        # The middle digit of a coordinate of 12 = 2 x 3 x 2.
        ("mesh['x'=12] {'x':(2)3}", [(0, 2, 4), (1, 3, 5), (6, 8, 10), (7, 9, 11)]),
    ],
)
def test_what_is_written(written: str, expected: list[tuple[int, ...]]):
    attributes = f", channel_id=1, replica_groups={written}, dimensions={{0}}"
    assert read_groups(attributes, sum(map(len, expected))) == expected


def test_pairs_all_devices_and_an_unknown_way():
    assert read_groups(", source_target_pairs={{0,1},{1,0}}", 2) == [(0, 1), (1, 0)]
    assert read_groups(", source_target_pairs={}", 2) == []
    assert read_groups(", dimensions={0}", 3) == [(0, 1, 2)]
    with pytest.raises(ValueError, match="written in an unknown way"):
        read_groups(", replica_groups=ring(0,1)", 2)
