"""Leaves as matrices and back, same-shaped matrices as stacks."""

from muonclip_jax.matrices.costs import describe_cost as describe_cost
from muonclip_jax.matrices.one_device import (
    orthogonalize_on_one_device as orthogonalize_on_one_device,
)
from muonclip_jax.matrices.parts import (
    LeafPlan as LeafPlan,
    Part as Part,
    from_matrices as from_matrices,
    join_leaf as join_leaf,
    plan_leaf as plan_leaf,
    split_leaf as split_leaf,
    to_matrices as to_matrices,
)
from muonclip_jax.matrices.sequential import (
    map_matrices as map_matrices,
    map_sequentially as map_sequentially,
    plan_chunks as plan_chunks,
)
from muonclip_jax.matrices.stacks import (
    Run as Run,
    StackPlan as StackPlan,
    map_parts as map_parts,
    map_stacks as map_stacks,
    plan_stacks as plan_stacks,
)
