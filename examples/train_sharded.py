"""Trains the byte-level GPT sharded over a mesh, FSDP x tensor parallel, and once on one device.

    python examples/train_sharded.py                on a machine without accelerators: 8 simulated
    python examples/train_sharded.py --tp 4

The step is that of one device. What makes it parallel are the shardings: of the parameters, which
`muonclip` gets too, of the batch, and of the maxima, whose heads lie where the kernels' heads do.
The picture lays the loss over that of one device, and shows what each device holds.
"""

import os

# Before JAX looks: eight CPU devices, unless XLA_FLAGS says otherwise. GPUs and TPUs do not mind.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
)

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from common import plots, program
from common.data import load_corpus
from common.model import GPT, next_byte_loss
from common.sharding import param_shardings
from common.training import Record, Settings, State, Training, clip_effect, step_record
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax import checkpoint


class Sharded(NamedTuple):
    """A training on one mesh: its first state, its compiled functions, where the batch goes."""

    state: State
    step: Any
    score: Any
    rows: NamedSharding


def build(settings: Settings, mesh: Mesh) -> Sharded:
    """Returns the training on a mesh of the axes "fsdp" and "tp"."""
    model = GPT(settings.model)
    whole, by_head = NamedSharding(mesh, P()), NamedSharding(mesh, P("tp"))

    def init_params() -> Any:
        tokens = jnp.zeros((1, settings.length), jnp.uint8)
        return model.init(jax.random.key(settings.seed), tokens)["params"]

    shapes = jax.eval_shape(init_params)
    shardings = param_shardings(mesh, shapes)
    tx = mc.muonclip(
        settings.schedule(),
        weight_decay=settings.decay,
        qk_clip_threshold=settings.threshold,
        param_shardings=shardings,
    )
    tx = mc.metrics(tx, qk_clip_threshold=settings.threshold)
    # Momentum and moments lie as their parameters do.
    moments = checkpoint.abstract_state(tx, shapes, shardings)
    places = State(
        step=whole,  # pyright: ignore[reportArgumentType] - shardings in the state's own tree
        params=shardings,
        optimizer=jax.tree.map(lambda leaf: leaf.sharding, moments),
    )

    # No device ever holds the whole state, not even while it is made.
    @partial(jax.jit, out_shardings=places)
    def init() -> State:
        params = init_params()
        return State(step=jnp.zeros((), jnp.int32), params=params, optimizer=tx.init(params))

    # Without out_shardings XLA may put results elsewhere than it found them.
    @partial(jax.jit, donate_argnums=0, out_shardings=(places, None))
    def step(state: State, tokens: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        (loss, max_logits), gradients = jax.value_and_grad(
            lambda params: next_byte_loss(model, params, tokens), has_aux=True
        )(state.params)
        # Over the whole batch, a number a head: a device keeps those of the heads it has.
        max_logits = jax.lax.with_sharding_constraint(max_logits, by_head)
        updates, optimizer = tx.update(
            gradients, state.optimizer, state.params, max_logits=max_logits
        )
        params = optax.apply_updates(state.params, updates)
        info = mc.qk_clip_info(state.params, max_logits, threshold=settings.threshold)
        record = step_record(settings, state.step, loss, info) | clip_effect(optimizer, params)
        return State(step=state.step + 1, params=params, optimizer=optimizer), record

    @partial(jax.jit, out_shardings=(whole, by_head))
    def score(state: State, tokens: jax.Array) -> tuple[jax.Array, Any]:
        return next_byte_loss(model, state.params, tokens)

    return Sharded(init(), step, score, rows=NamedSharding(mesh, P("fsdp")))


def held(tree: Any) -> dict[int, float]:
    """Returns how many MB of a tree lie on each device, by the device's number."""
    sizes: dict[int, float] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            sizes[shard.device.id] = sizes.get(shard.device.id, 0.0) + shard.data.nbytes / 1e6
    return sizes


def table(params: Any, max_logits: Any) -> str:
    """Returns the shardings of one layer, of the parameters outside layers, and of the maxima."""
    lines = ["| array | shape | sharded over | shape per device |", "|---|---|---|---|"]
    for path, leaf in jax.tree.leaves_with_path((params, max_logits)):
        name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        if not name.startswith("block_") or name.startswith("block_0/"):
            axes = ", ".join(map(str, leaf.sharding.spec)) or "nothing"
            piece = leaf.addressable_shards[0].data.shape
            lines.append(f"| {name} | {leaf.shape} | {axes} | {piece} |")
    return "\n".join(lines)


def draw(path: Path, runs: dict[str, tuple[State, list[Record]]]) -> None:
    """Draws the loss curves over each other, and what every device holds."""
    drawn, (left, right) = plots.figure(2)
    styles = zip(("0.7", plots.COLORS["muonclip"]), (4.0, 1.2), strict=True)
    ticks: list[str] = []
    for (name, (state, records)), (color, width) in zip(runs.items(), styles, strict=True):
        loss = plots.series(records, "train_loss")
        left.plot(*loss, color=color, linewidth=width, label=name)
        params, moments = held(state.params), held(state.optimizer)
        bars = range(len(ticks), len(ticks) + len(params))
        below = list(params.values())
        right.bar(bars, below, color=color, label=f"parameters, {name}")
        shade = {"color": color, "alpha": 0.6, "hatch": "//", "edgecolor": "white"}
        right.bar(bars, moments.values(), bottom=below, label=f"optimizer, {name}", **shade)
        ticks += [str(number) for number in params]
    left.set_ylabel("nats per byte, training batch")
    left.legend()
    right.set_xticks(range(len(ticks)), ticks)
    right.set(xlabel="device", ylabel="MB held")
    right.legend()
    plots.save(drawn, path)


def main(arguments: list[str] | None = None) -> list[Record]:
    """Trains on one device and on the mesh, compares, and draws the picture."""
    parser = program.parser("train_sharded", __doc__)
    program.add_picture(parser)
    parser.add_argument("--tp", type=int, default=2, help="devices that share the heads of a layer")
    options = parser.parse_args(arguments)
    settings = program.settings_of(options)
    count = jax.device_count()
    if count % options.tp or settings.batch_size % (count // options.tp):
        parser.error(
            f"{count} devices and a batch of {settings.batch_size} windows: --tp must divide the "
            "devices, and the devices divided by --tp the batch; change --tp or --batch-size."
        )
    mesh = jax.make_mesh((count // options.tp, options.tp), ("fsdp", "tp"), (AxisType.Auto,) * 2)
    run = partial(program.train, options, settings)

    # The training of train_lm.py, which knows of no mesh.
    single = Training(settings, load_corpus(options.data))
    one = run(
        single.init(),
        step=single.step,
        score=lambda state, tokens: single.score(state.params, tokens),
        name="one_device",
    )
    sharded = build(settings, mesh)
    place = partial(jax.device_put, device=sharded.rows)
    many = run(
        sharded.state,
        step=sharded.step,
        score=lambda state, tokens: sharded.score(state, tokens)[0],
        place=place,
        name="mesh",
    )
    _, max_logits = sharded.score(many[0], place(single.scored))
    print(table(many[0].params, max_logits))
    losses = [[record["train_loss"] for record in records] for _, records in (one, many)]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(
        f"MB of parameters and optimizer on a device: one {max(held(one[0]).values()):.2f}, mesh "
        f"{max(held(many[0]).values()):.2f}; losses of {len(losses[0])} steps are at most "
        f"{apart:.1e} apart"
    )
    picture = program.picture_of(options)
    draw(picture, {"one device": one, f"mesh {mesh.shape['fsdp']} x {mesh.shape['tp']}": many})
    print(f"picture: {picture}")
    return many[1]


if __name__ == "__main__":
    main()
