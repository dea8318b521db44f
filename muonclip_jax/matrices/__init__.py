"""Leaves as matrices and back, same-shaped matrices as stacks."""

from muonclip_jax.matrices.costs import describe_cost as describe_cost
from muonclip_jax.matrices.parts import (
    LeafPlan as LeafPlan,
    Run as Run,
    even_size as even_size,
    from_matrices as from_matrices,
    plan_leaf as plan_leaf,
    runs_of as runs_of,
    to_matrices as to_matrices,
)
from muonclip_jax.matrices.sequential import (
    map_matrices as map_matrices,
    map_sequentially as map_sequentially,
    plan_chunks as plan_chunks,
)
from muonclip_jax.matrices.stacks import (
    StackPlan as StackPlan,
    map_parts as map_parts,
    orthogonalize_on_one_device as orthogonalize_on_one_device,
    plan_stacks as plan_stacks,
)
