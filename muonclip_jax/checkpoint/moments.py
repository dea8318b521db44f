"""States of other transformations: moments carried over by the parameter that they belong to.

Muon's momentum and Adam's two moments mean the same wherever they are: exponential averages of the
gradient and of its square, kept without bias correction. So they can be moved from one state to
another by name, whatever chains and labels are around them. Two things need care.

**Counts.** Bias corrections and schedules read how many updates there were. One number stands for
all of them.

**Other routing.** Optax trains by Muon what has two axes, Flax's attention biases and embeddings
too, and its attention kernels by Adam; `muonclip` does it the other way. For such a leaf one moment
is there and another is missing. Adam's first moment is a momentum, if a shorter one, and Muon looks
at nothing but its direction. From Muon to Adam the mean square is missing, and cannot start at
zero beside a count that is large: the first update would be up to `1 / sqrt(1 - b2)` times too
long. It is estimated from the momentum. Where the gradient is mostly noise of variance `v`, an
average with decay `beta` has the variance `v (1 - beta) / (1 + beta)`, so that

    nu = (1 + beta) / (1 - beta) mean(mu^2)

with the mean over the whole leaf. That holds for counts far above `1 / (1 - b2)` and
`1 / (1 - beta)`. Earlier, at count `t`, Adam's own average is `1 - b2^t` times its limit and the
variance of the momentum `1 - beta^(2 t)` times the above; with Adam's usual `b2` nearer to one than
`beta`, the estimate is then too large, as it is where the gradient is steady. Too large makes the
first updates too short, which is the safe side; Adam's own average replaces it in `1 / (1 - b2)`
steps.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from muonclip_jax._tree import (
    SEPARATOR,
    ScalarLike,
    Tree,
    compile_pattern,
    flatten_with_paths,
    listed,
    nothing_matched,
)
from muonclip_jax.checkpoint.names import owner_of, without_box
from muonclip_jax.checkpoint.targets import abstract_state

#: Names of the exponential averages in a state: of the gradient and of its square.
FIRST, SECOND = "mu", "nu"
#: Names of numbers of updates.
COUNTS = ("count", "gradient_step")
#: Names of settings that a state carries along; the transformation of now has its own.
SETTINGS = ("ns_coeffs", "hyperparams")
#: What to do with a leaf that changes between Muon and Adam.
REROUTED = ("error", "estimate")


class _Read(NamedTuple):
    """A state by what its leaves are.

    Attributes:
        moments: (trainer, moment, parameter) -> path of the leaf.
        counts: Paths of numbers of updates.
        rest: Paths of everything else.
        leaves: Path -> leaf, in the tree's order.
    """

    moments: dict[tuple[str, str, str], str]
    counts: list[str]
    rest: list[str]
    leaves: dict[str, Any]


def from_optax_state(
    optax_state: Tree,
    tx: optax.GradientTransformation,
    params: Tree,
    *,
    rerouted: str = "error",
    beta: ScalarLike = 0.95,
    ignore: Sequence[str] = (),
) -> Tree:
    """Turns the state of `optax.contrib.muon`, or of AdamW, into one for `tx`.

    Every moment goes to the parameter that it belongs to, and all counts to the number of updates
    that the state has seen. For `muonclip_jax.muon` with the arguments of `optax.contrib.muon`
    training goes on as if nothing had happened. `muonclip` and `scale_by_muon` keep the same
    momentum and do not correct its bias, so that their next updates differ as the two
    transformations do: after `1 / (1 - beta)` steps, hardly.

    Where Adam trained a leaf that `tx` trains by Muon, or the other way around, it is an error that
    names the leaf, or with `rerouted="estimate"`:

    1. From Adam to Muon, Adam's first moment is the momentum. Its mean square is dropped. A state
       of `optax.adamw` goes to Muon in this way.
    2. From Muon to Adam, the momentum is Adam's first moment, and its mean square is
       `(1 + beta) / (1 - beta) mean(mu^2)`: right for counts far above `1 / (1 - b2)`, too large
       before, so that first updates are shorter. The module's docstring derives it.

    Whatever else the state of `tx` has (accumulated gradients, hyperparameters) is as `tx.init`
    makes it. Nothing of `optax_state` is lost in silence: a leaf that has no place is an error,
    but for settings (`ns_coeffs`, `hyperparams`), of which `tx` has its own.

    Args:
        optax_state: A state, in any chain or partition, with arrays; or the nested dicts and lists
            that Orbax restores it to without a target. Not traced.
        tx: The transformation to go on with.
        params: The parameters, in the tree that both have been made for. Arrays, or
            `jax.ShapeDtypeStruct` where `tx` keeps nothing but moments and counts.
        rerouted: "error" or "estimate".
        beta: Decay of the momentum that was Muon's, for the estimate.
        ignore: Patterns of paths in `optax_state` to leave behind.

    Returns:
        A state with the structure, shapes, dtypes and shardings of `abstract_state(tx, params)`.
        Moments are cast to the dtype that `tx` keeps them in.

    Raises:
        ValueError: With the path, if a moment is missing, was another trainer's, has another shape
            or would be left behind; if counts differ; if a pattern matches nothing; or for an
            unknown `rerouted`.
        TypeError: If `params` has to be arrays and is not.

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
    if rerouted not in REROUTED:
        raise ValueError(
            f"rerouted must be one of {', '.join(map(repr, REROUTED))}, got {rerouted!r}."
        )
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten_with_paths(params)[0]}
    source = _read(optax_state, shapes, ignore)
    form = abstract_state(tx, params)
    target = _read(form, shapes)
    values: dict[str, Any] = {}
    taken: set[str] = set()
    changed: dict[str, list[str]] = {"muon": [], "adam": []}
    for (trainer, which, owner), path in target.moments.items():
        other = "adam" if trainer == "muon" else "muon"
        if (trainer, which, owner) in source.moments:
            found = source.moments[trainer, which, owner]
            taken.add(found)
            value = _fitting(source.leaves[found], found, owner, shapes)
        elif (other, FIRST, owner) in source.moments:
            changed[other].append(owner)
            found = source.moments[other, FIRST, owner]
            taken |= {p for (t, _, o), p in source.moments.items() if (t, o) == (other, owner)}
            value = _fitting(source.leaves[found], found, owner, shapes)
            value = value if which == FIRST else _mean_square(value, beta)
        else:
            raise ValueError(
                f"optax_state has no {which} for {owner!r}, which tx trains by "
                f"{trainer.capitalize()}. Give the state of all parameters that tx trains."
            )
        values[path] = value
    if rerouted == "error" and any(changed.values()):
        raise _other_trainer(changed)
    left = [path for path in source.moments.values() if path not in taken] + source.rest
    if left:
        raise ValueError(
            f"optax_state has {listed(left)}, for which the state of tx "
            "has no place. Give both the same parameters, or name in ignore=[...] what may be "
            "left behind."
        )
    if target.counts:
        values |= dict.fromkeys(target.counts, _common_count(source))
    values |= _initial(tx, params, target)
    leaves = [_like(values[path], leaf) for path, leaf in target.leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(form), leaves)


def _read(state: Tree, owners: Collection[str], ignore: Sequence[str] = ()) -> _Read:
    leaves = dict(flatten_with_paths(state)[0])
    patterns = [compile_pattern(pattern) for pattern in ignore]
    for pattern in patterns:
        if not any(pattern.search(path) for path in leaves):
            raise nothing_matched("The pattern in ignore", pattern.pattern, leaves)
    found: list[tuple[str, str, str, str]] = []
    counts, rest = [], []
    for path in leaves:
        names = path.split(SEPARATOR)
        owner = owner_of(path, owners)
        node, which = _node(path, owner) if owner is not None else ("", "")
        if any(pattern.search(path) for pattern in patterns):
            continue
        if owner is not None and which in (FIRST, SECOND):
            found.append((node, which, owner, path))
        elif names[-1] in COUNTS:
            counts.append(path)
        elif not set(names) & set(SETTINGS):
            rest.append(path)
    with_squares = {node for node, which, _, _ in found if which == SECOND}
    moments: dict[tuple[str, str, str], str] = {}
    for node, which, owner, path in found:
        key = ("adam" if node in with_squares else "muon", which, owner)
        if key in moments:
            raise ValueError(
                f"A state has two moments for {owner!r}, {moments[key]!r} and {path!r}, and it "
                "cannot be told which one is meant. Name one of them in ignore=[...], or give the "
                "state of one of the transformations."
            )
        moments[key] = path
    return _Read(moments=moments, counts=counts, rest=rest, leaves=leaves)


def _node(path: str, owner: str) -> tuple[str, str]:
    """Returns where in the state a moment of `owner` is, and which one it is."""
    ending = path if path.endswith(owner) else without_box(path)
    node, _, which = ending.removesuffix(SEPARATOR + owner).rpartition(SEPARATOR)
    return node, which


def _fitting(value: Any, path: str, owner: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    if tuple(value.shape) != shapes[owner]:
        raise ValueError(
            f"optax_state has {path!r} of shape {tuple(value.shape)}, and the parameter {owner!r} "
            f"has shape {shapes[owner]}. Give the state of these parameters."
        )
    return value


def _other_trainer(changed: Mapping[str, Sequence[str]]) -> ValueError:
    """Builds the error for parameters that another trainer had before."""
    sentences = [
        f"{listed(dict.fromkeys(owners))} trained by {before}, which tx trains by {now} (to "
        f"keep one there: the rule {rule})."
        for before, now, rule, owners in (
            ("Adam", "Muon", "(path, None)", changed["adam"]),
            ("Muon", "Adam", "(path, MatrixSpec())", changed["muon"]),
        )
        if owners
    ]
    return ValueError(
        f"optax_state has {' It has '.join(sentences)} Keep leaves where they were with "
        "rules=MatrixRules([...]), route all as Optax does with muonclip_jax.muon, or pass "
        'rerouted="estimate" to start from what is known of them.'
    )


def _mean_square(mu: Any, beta: ScalarLike) -> jax.Array:
    mean = jnp.mean(jnp.square(jnp.abs(jnp.asarray(mu).astype(jnp.promote_types(mu.dtype, "f4")))))
    return jnp.full(mu.shape, (1 + beta) / (1 - beta) * mean)


def _common_count(source: _Read) -> np.ndarray:
    counts = {path: np.asarray(source.leaves[path]) for path in source.counts}
    values = {int(count) for count in counts.values() if count.shape == ()}
    if len(values) != 1 or any(count.shape for count in counts.values()):
        shown = ", ".join(f"{path!r}: {count}" for path, count in counts.items()) or "none"
        raise ValueError(
            f"optax_state must have one number of updates, and its counts are {shown}. Name those "
            "that do not count updates in ignore=[...]."
        )
    return np.asarray(values.pop())


def _initial(tx: optax.GradientTransformation, params: Tree, target: _Read) -> dict[str, Any]:
    """What neither moments nor counts tell, as `tx.init` makes it, and nothing else of it."""
    paths = [path for path in target.leaves if path not in _known(target)]
    if not paths:
        return {}
    if not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(params)):
        raise TypeError(
            f"The state of tx has {paths[0]!r}, which tx.init makes from the parameters, so that "
            "params must be arrays here."
        )

    # Compiled, so that the moments among its results are never made.
    @jax.jit
    def initial(params: Tree) -> list[jax.Array]:
        leaves = dict(flatten_with_paths(tx.init(params))[0])
        return [leaves[path] for path in paths]

    return dict(zip(paths, initial(params), strict=True))


def _known(read: _Read) -> set[str]:
    return {*read.moments.values(), *read.counts}


def _like(value: Any, form: jax.ShapeDtypeStruct) -> jax.Array:
    # A new array for every count: a state whose leaves share memory cannot be donated.
    value = jnp.array(value, form.dtype) if value.ndim == 0 else jnp.asarray(value, form.dtype)
    return value if form.sharding is None else jax.device_put(value, form.sharding)
