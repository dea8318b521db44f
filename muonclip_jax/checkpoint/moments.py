"""Converts states of other transformations: moments are matched by parameter.

Muon's momentum and Adam's two moments are exponential averages of the gradient and of its square,
stored without bias correction, in every chain, so they can be copied from one state to another by
name. From Muon to Adam the second moment is missing; zero with a large count would make the first
update up to `1 / sqrt(1 - b2)` times too large. If the gradient is mostly noise of variance `v`, an
average with decay `beta` has variance `v (1 - beta) / (1 + beta)`, so, with the mean over the whole
leaf, `nu = (1 + beta) / (1 - beta) mean(mu^2)`. For counts below `1 / (1 - b2)` and
`1 / (1 - beta)`, or gradients with little noise, it is too large, and the first updates are too
small until Adam's own average replaces it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from muonclip_jax._arguments import check_choice
from muonclip_jax._tree import (
    SEPARATOR,
    ScalarLike,
    Tree,
    compile_pattern,
    flatten_with_paths,
    listed,
    nothing_matched,
)
from muonclip_jax.checkpoint.targets import abstract_state, split_owner

#: Names of the exponential averages in a state: of the gradient and of its square.
FIRST, SECOND = "mu", "nu"
#: Names of numbers of updates.
COUNTS = ("count", "gradient_step")
#: Names of settings that a state may contain; the new transformation has its own.
SETTINGS = {"ns_coeffs", "hyperparams"}


class _Read(NamedTuple):
    """The leaves of a state by kind."""

    leaves: dict[str, Tree]  # by path, in the tree's order
    moments: dict[tuple[str, str], str]  # (moment, parameter) -> path
    counts: list[str]  # paths of numbers of updates
    rest: list[str]

    def trainer(self, parameter: str) -> str:
        """Adam has a second moment."""
        return "Adam" if (SECOND, parameter) in self.moments else "Muon"


def from_optax_state(
    optax_state: Tree,
    tx: optax.GradientTransformation,
    params: Tree,
    *,
    rerouted: str = "error",
    beta: ScalarLike = 0.95,
    ignore: Sequence[str] = (),
) -> Tree:
    """Converts a state of `optax.contrib.muon` or AdamW to a state of `tx`.

    Every moment is assigned to its parameter, and every count is set to the number of updates so
    far. With `muonclip_jax.muon` and the arguments of `optax.contrib.muon`, training continues on
    the same trajectory. `muonclip` and `scale_by_muon` use the same momentum without bias
    correction, which is a negligible difference after about `1 / (1 - beta)` steps.

    A leaf that changes between Adam and Muon is an error that names it, unless
    `rerouted="estimate"`: then Adam's first moment and Muon's momentum become each other, and
    Adam's second moment is `(1 + beta) / (1 - beta) mean(mu^2)`, which is accurate for counts far
    above `1 / (1 - b2)` and too large before, so that the first updates are smaller.

    Other parts of the state of `tx` (accumulated gradients, hyperparameters) are as `tx.init`
    creates them. A leaf of `optax_state` without counterpart is an error, except settings
    (`ns_coeffs`, `hyperparams`).

    Args:
        optax_state: A state of any chain or partition, with concrete arrays; or the nested dicts
            and lists that Orbax restores without a target.
        tx: The transformation to continue with.
        params: The parameters of both states: arrays, or `jax.ShapeDtypeStruct` if the state of
            `tx` has only moments and counts.
        rerouted: "error" or "estimate".
        beta: Decay rate of the old Muon momentum, for the estimate.
        ignore: Patterns of paths in `optax_state` to ignore.

    Returns:
        A state with the structure, shapes, dtypes and shardings of `abstract_state(tx, params)`.
        Moments are cast to the dtypes of `tx`.

    Raises:
        ValueError: With the path, if a moment is missing, belongs to the other optimizer, has
            another shape or is not used; if counts differ; if a pattern matches nothing; or for an
            unknown `rerouted`.
        TypeError: If `params` must be arrays and is not.

    Example:
        >>> params = {"w": jnp.eye(2, 3), "b": jnp.zeros(3)}
        >>> old = optax.contrib.muon(0.02)
        >>> _, optax_state = old.update(params, old.init(params), params)
        >>> from muonclip_jax import muon
        >>> state = from_optax_state(optax_state, muon(0.02), params)
        >>> muon_state = state.inner_states["muon"].inner_state[0]
        >>> int(muon_state.count), muon_state.mu["w"].shape
        (1, (2, 3))
    """
    check_choice("rerouted", rerouted, ("error", "estimate"))
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten_with_paths(params)[0]}
    form = abstract_state(tx, params)
    source, target = _read(optax_state, shapes, ignore), _read(form, shapes)
    values: dict[str, jax.Array] = {}
    changed: dict[str, list[str]] = {"Adam": [], "Muon": []}
    for (which, owner), path in target.moments.items():
        now, before = target.trainer(owner), source.trainer(owner)
        if (FIRST, owner) not in source.moments:
            raise ValueError(
                f"optax_state has no {FIRST} for {owner!r}, which tx trains by {now}. Give the "
                "state of all parameters that tx trains."
            )
        found = source.moments.get((which, owner), source.moments[FIRST, owner])
        value = source.leaves[found]
        if tuple(value.shape) != shapes[owner]:
            raise ValueError(
                f"optax_state has {found!r} of shape {tuple(value.shape)}, and the parameter "
                f"{owner!r} has shape {shapes[owner]}. Give the state of these parameters."
            )
        if now != before:
            changed[before].append(owner)
            if which == SECOND:
                wide = jnp.asarray(value).astype(jnp.promote_types(value.dtype, "f4"))
                mean_square = jnp.mean(jnp.square(jnp.abs(wide)))
                value = jnp.full(value.shape, (1 + beta) / (1 - beta) * mean_square)
        values[path] = value
    if rerouted == "error":
        _check_same_trainers(changed)
    owners = {owner for _, owner in target.moments}
    unused = [path for (_, owner), path in source.moments.items() if owner not in owners]
    if unused := unused + source.rest:
        raise ValueError(
            f"optax_state has {listed(unused)}, which the state of tx does not have. Give both "
            "the same parameters, or list in ignore=[...] what may be dropped."
        )
    if target.counts:
        values |= dict.fromkeys(target.counts, _common_count(source))
    values |= _initial(tx, params, [path for path in target.leaves if path not in values])
    leaves = []
    for path, like in target.leaves.items():
        # A new array for every count: a state whose leaves share memory cannot be donated.
        x = (jnp.asarray if like.ndim else jnp.array)(values[path], like.dtype)
        leaves.append(x if like.sharding is None else jax.device_put(x, like.sharding))
    return jax.tree.unflatten(jax.tree.structure(form), leaves)


def _read(state: Tree, shapes: Mapping[str, tuple[int, ...]], ignore: Sequence[str] = ()) -> _Read:
    """Reads a state of parameters with these shapes."""
    read = _Read(dict(flatten_with_paths(state)[0]), {}, [], [])
    patterns = [compile_pattern(pattern) for pattern in ignore]
    for pattern in patterns:
        if not any(map(pattern.search, read.leaves)):
            raise nothing_matched("The pattern in ignore", pattern.pattern, read.leaves)
    for path, leaf in read.leaves.items():
        if any(pattern.search(path) for pattern in patterns):
            continue
        start, owner = split_owner(path, shapes)
        which, names = start.rpartition(SEPARATOR)[2], path.split(SEPARATOR)
        # Averages of rows or columns are called nu too.
        if owner is not None and (
            which == FIRST or (which == SECOND and np.shape(leaf) == shapes[owner])
        ):
            if read.moments.setdefault((which, owner), path) != path:
                raise ValueError(
                    f"A state has two moments for {owner!r}, {read.moments[which, owner]!r} and "
                    f"{path!r}, and it is ambiguous which one to use. List one of them in "
                    "ignore=[...], or give the state of one of the transformations."
                )
        elif names[-1] in COUNTS:
            read.counts.append(path)
        elif not SETTINGS.intersection(names):
            read.rest.append(path)
    return read


def _check_same_trainers(changed: Mapping[str, Sequence[str]]) -> None:
    """Raises for parameters that the other optimizer trained before."""
    rules = {"Adam": ("Muon", "(path, None)"), "Muon": ("Adam", "(path, MatrixSpec())")}
    sentences = [
        f"{listed(dict.fromkeys(paths))} trained by {before}, which tx trains by "
        f"{rules[before][0]} (to keep one there: the rule {rules[before][1]})."
        for before, paths in changed.items()
        if paths
    ]
    if sentences:
        raise ValueError(
            f"optax_state has {' It has '.join(sentences)} Keep leaves where they were with "
            "rules=MatrixRules([...]), route all as Optax does with muonclip_jax.muon, or pass "
            'rerouted="estimate" to start from what is known of them.'
        )


def _common_count(source: _Read) -> jax.Array:
    counts = {path: np.asarray(source.leaves[path]) for path in source.counts}
    if {x.shape for x in counts.values()} != {()} or len(set(map(int, counts.values()))) > 1:
        shown = ", ".join(f"{path!r}: {count}" for path, count in counts.items()) or "none"
        raise ValueError(
            f"optax_state must have one number of updates, and its counts are {shown}. Name those "
            "that do not count updates in ignore=[...]."
        )
    return jnp.asarray(int(next(iter(counts.values()))))


def _initial(
    tx: optax.GradientTransformation, params: Tree, paths: Sequence[str]
) -> dict[str, jax.Array]:
    """Returns the leaves at `paths` as `tx.init` creates them."""
    arrays = jax.tree.leaves(params)
    if paths and not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in arrays):
        raise TypeError(
            f"The state of tx has {paths[0]!r}, which tx.init computes from the parameters, so "
            "params must be arrays here."
        )

    def initial(params: Tree) -> dict[str, jax.Array]:
        leaves = dict(flatten_with_paths(tx.init(params))[0])
        return {path: leaves[path] for path in paths}

    # Compiled, so that the moments are never made.
    return jax.jit(initial)(params) if paths else {}
