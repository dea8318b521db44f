"""Leaves as matrices and back, same-shaped matrices as stacks."""

from muonclip_jax.matrices.costs import describe_cost as describe_cost
from muonclip_jax.matrices.parts import plan_leaf as plan_leaf
from muonclip_jax.matrices.stacks import (
    StackPlan as StackPlan,
    map_parts as map_parts,
    plan_stacks as plan_stacks,
)
