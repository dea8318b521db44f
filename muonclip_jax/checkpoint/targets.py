"""Restore targets: pytrees of shapes, dtypes and shardings, and the check of a checkpoint."""

from collections.abc import Collection

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from muonclip_jax._tree import SEPARATOR, Shaped, Tree, flatten_with_paths
from muonclip_jax.sharding.reading import align_shardings
from muonclip_jax.transforms._states import differences


def abstract_params(params: Tree, param_shardings: Tree = None, mesh: Mesh | None = None) -> Tree:
    """Describes parameters without their values: shape, dtype and sharding.

    Args:
        params: Arrays or `jax.ShapeDtypeStruct`s, as from `jax.eval_shape`, or an `nnx.state`.
        param_shardings: A pytree of `NamedSharding`, or with `mesh` of `PartitionSpec`, with an
            entry for every leaf or subtree; a single one for all leaves; or a function from
            `params` to such a pytree. None as an entry means replicated. None uses the parameters'
            shardings; where some are on a mesh, the others are replicated on it.
        mesh: The mesh of the `PartitionSpec`s. It may differ from that of the checkpoint.

    Returns:
        A pytree of `jax.ShapeDtypeStruct`, with shardings where they are known.

    Raises:
        TypeError: If an entry is not a sharding, or is a `PartitionSpec` without a mesh.
        ValueError: With the leaf's path, if a leaf has no entry, or its entry has an axis that is
            not in the mesh, has too many dimensions or does not divide the shape.

    Example:
        >>> mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
        >>> params = {"w": jax.ShapeDtypeStruct((16, 4), "float32")}
        >>> target = abstract_params(params, {"w": PartitionSpec("fsdp")}, mesh)
        >>> target["w"].shape, target["w"].sharding.spec
        ((16, 4), P('fsdp',))
    """
    if param_shardings is None:
        if mesh is not None:
            raise ValueError(
                "abstract_params got a mesh and no param_shardings. Write "
                "param_shardings=PartitionSpec() to replicate all parameters on it."
            )

        def on_mesh(x: Shaped) -> NamedSharding | None:
            sharding = getattr(x, "sharding", None)
            return sharding if isinstance(getattr(sharding, "mesh", None), Mesh) else None

        aligned = [(path, leaf, on_mesh(leaf)) for path, leaf in flatten_with_paths(params)[0]]
    else:
        aligned = align_shardings(params, param_shardings, mesh)
    known = [sharding.mesh for *_, sharding in aligned if sharding]
    rest = NamedSharding(known[0], PartitionSpec()) if known else None
    forms = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or rest)
        for _, leaf, sharding in aligned
    ]
    return jax.tree.unflatten(jax.tree.structure(params), forms)


def abstract_state(
    tx: optax.GradientTransformation,
    params: Tree,
    param_shardings: Tree = None,
    mesh: Mesh | None = None,
) -> Tree:
    """Describes the state of a transformation without allocating it, as a restore target.

    A leaf that belongs to a parameter is sharded like the parameter, or as by the transformation's
    `init` (momentum with `Distribution(shard_momentum=True)`); other leaves, such as counts, are
    replicated.

    Args:
        tx: Any transformation, built for the current mesh.
        params: As in `abstract_params`.
        param_shardings: As in `abstract_params`.
        mesh: As in `abstract_params`.

    Returns:
        The structure of `tx.init(params)`, with leaves `jax.ShapeDtypeStruct`, with shardings if
        those of the parameters are known.

    Raises:
        TypeError: As in `abstract_params`.
        ValueError: As in `abstract_params`, or if the parameters are on several meshes.

    Example:
        >>> from muonclip_jax import scale_by_muon
        >>> mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
        >>> params = {"w": jax.ShapeDtypeStruct((16, 4), "float32")}
        >>> target = abstract_state(scale_by_muon(), params, PartitionSpec("fsdp"), mesh)
        >>> target.mu["w"].sharding.spec, target.count.sharding.spec
        (P('fsdp',), P())
    """
    params = abstract_params(params, param_shardings, mesh)
    by_path = dict(flatten_with_paths(params)[0])
    meshes = {x.sharding.mesh for x in by_path.values() if x.sharding is not None}
    if len(meshes) > 1:
        first, second, *_ = (dict(mesh.shape) for mesh in meshes)
        raise ValueError(
            f"The parameters are on the meshes {first} and {second}. A state must be restored to "
            "one mesh: give all parameters shardings on it."
        )
    if not meshes:
        return jax.eval_shape(tx.init, params)
    (on,) = meshes
    with jax.set_mesh(on):
        # On Auto axes the shardings that `init` requests are only known from its compiled program.
        lowered = jax.jit(tx.init).lower(params)
        compiled = lowered.compile().output_shardings
    leaves, structure = flatten_with_paths(lowered.out_info)
    targets = []
    for (path, leaf), asked in zip(leaves, jax.tree.leaves(compiled), strict=True):
        sharding = NamedSharding(on, PartitionSpec())
        _, owner = split_owner(path, by_path)
        if owner is not None and by_path[owner].shape == leaf.shape:
            sharding = by_path[owner].sharding
        if not (asked.is_fully_replicated or asked.is_equivalent_to(sharding, leaf.ndim)):
            sharding = NamedSharding(on, asked.spec)
        targets.append(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))
    return jax.tree.unflatten(structure, targets)


def check_saved(saved: Tree, target: Tree) -> None:
    """Raises if a checkpoint does not match the restore target.

    Mesh, shardings and number of devices may differ: a restore uses the shardings of the target.
    Paths, shapes and dtypes may not differ. Call it before restoring, because a library may
    silently cast, pad or omit leaves.

    Args:
        saved: The metadata of the checkpoint (with Orbax `manager.item_metadata(step)`) or a
            restored pytree; every leaf needs a shape and a dtype.
        target: The pytree to restore, of arrays or `jax.ShapeDtypeStruct`, such as
            `abstract_state(tx, params)`.

    Raises:
        ValueError: If a leaf is in only one of the two, or has another shape or dtype. The message
            has the paths, at most eight of a kind.
        TypeError: If a leaf has no shape or dtype, or `saved` is None.

    Example:
        >>> saved = {"w": jax.ShapeDtypeStruct((4, 4), "float32")}
        >>> check_saved(saved, {"w": jax.ShapeDtypeStruct((4, 2), "float32")})
        Traceback (most recent call last):
        ...
        ValueError: The checkpoint does not match the restore target.
        - 'w' has shape (4, 4) in the checkpoint, (4, 2) in the target.
        Nothing was restored. Build model and optimizer as they were when it was saved, or restore \
the checkpoint as it is and convert it (muonclip_jax.checkpoint.from_optax_state).
    """
    if saved is None:
        raise TypeError(
            "The checkpoint's metadata is None: the library has no handler to read it. An Orbax "
            "manager that has not saved yet needs item_handlers=StandardCheckpointHandler()."
        )
    there, wanted = _forms(saved, "checkpoint"), _forms(target, "target")
    findings = differences(there, wanted, ("the checkpoint", "the target"), "shape dtype")
    if findings:
        listing = "".join(f"- {finding}.\n" for finding in findings)
        raise ValueError(
            f"The checkpoint does not match the restore target.\n{listing}Nothing was restored. "
            "Build model and optimizer as they were when it was saved, or restore the checkpoint "
            "as it is and convert it (muonclip_jax.checkpoint.from_optax_state)."
        )


def _forms(tree: Tree, which: str) -> dict[str, jax.ShapeDtypeStruct]:
    forms = {}
    for path, leaf in flatten_with_paths(tree, is_leaf=lambda x: isinstance(x, Shaped))[0]:
        if not isinstance(leaf, Shaped):
            raise TypeError(
                f"The {which} has {leaf!r} at {path!r}, expected a leaf with a shape and a "
                "dtype: an array, a jax.ShapeDtypeStruct or a checkpoint's metadata of one."
            )
        forms[without_box(path)] = jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
    return forms


def split_owner(path: str, params: Collection[str]) -> tuple[str, str | None]:
    """Splits a path before the parameter that is its suffix, the longest if several are.

    A last "value" is ignored: it is from a box, restored as a dict without a target.

    Example:
        >>> split_owner("0/mu/dense/kernel", {"kernel", "dense/kernel"})
        ('0/mu', 'dense/kernel')
    """
    for ending in (path, without_box(path)):
        names = ending.split(SEPARATOR)
        for start in range(1, len(names)):
            if (owner := SEPARATOR.join(names[start:])) in params:
                return SEPARATOR.join(names[:start]), owner
    return "", None


def without_box(path: str) -> str:
    """Returns `path` without the "value" of a box at its end."""
    return path.removesuffix(SEPARATOR + "value")
