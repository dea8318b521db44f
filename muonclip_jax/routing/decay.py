"""Which parameters weight decay is for: all but norms, gains and biases."""

import jax

from muonclip_jax._tree import Tree
from muonclip_jax.routing.rules import MatrixRules, as_rules


def decay_mask(params: Tree, rules: MatrixRules | None = None) -> Tree:
    """Returns the same tree of bools: True where weight decay applies.

    A leaf that Muon trains decays. Of the others, norms, gains, biases and all vectors do not,
    stacked over layers or not; embeddings, heads and routers do.

    Args:
        params: The tree of parameters, or a masked or partial one; only shapes are looked at.
        rules: A `MatrixRules`; None is `MatrixRules()`.

    Returns:
        The tree of bools, as `optax.add_decayed_weights` takes it for its `mask`.

    Raises:
        ValueError: If a leaf of rank three or more is not known.

    Example:
        >>> import jax.numpy as jnp
        >>> dense = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
        >>> decay_mask({"dense": dense, "embed": {"embedding": jnp.ones((9, 4))}})
        {'dense': {'bias': False, 'kernel': True}, 'embed': {'embedding': True}}

    References:
        Kimi K2, arXiv 2507.20534: decay 0.1; norms and biases are left out as is usual.
    """
    decided = as_rules(rules).decisions(params)
    decays = [decision.spec is not None or decision.decays for _, _, decision in decided]
    return jax.tree.unflatten(jax.tree.structure(params), decays)
