"""Floor 3: leaves as matrices, same-shaped matrices as stacks, factors by shape."""

from muonclip_jax.matrices.costs import describe_cost as describe_cost
from muonclip_jax.matrices.distribution import (
    Distribution as Distribution,
    MeshShardings as MeshShardings,
    align_shardings as align_shardings,
    alike as alike,
    check_momentum as check_momentum,
    is_entry as is_entry,
    on_devices as on_devices,
    orthogonalize_leaves as orthogonalize_leaves,
    place as place,
    read_shardings as read_shardings,
    spread_momentum as spread_momentum,
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
from muonclip_jax.matrices.scales import (
    SHAPE_RULE_ALIASES as SHAPE_RULE_ALIASES,
    SHAPE_RULES as SHAPE_RULES,
    shape_rule as shape_rule,
)
from muonclip_jax.matrices.stacks import (
    Stack as Stack,
    StackPlan as StackPlan,
    map_stacks as map_stacks,
    plan_stacks as plan_stacks,
)
from muonclip_jax.matrices.turns import (
    Turn as Turn,
    TurnPlan as TurnPlan,
    map_in_turn as map_in_turn,
    plan_turns as plan_turns,
)
