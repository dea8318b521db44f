"""Flax NNX on a mesh: own attention, accumulation, TensorBoard, FSDP, save and resume with Orbax.

python examples/stacks/train_nnx.py [folder for the checkpoint]
"""

import tempfile

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from shared import WORDS, batch, check_clip, check_describe, check_losses, check_routing
from tensorboardX import SummaryWriter

import muonclip_jax as mc
from muonclip_jax import checkpoint
from muonclip_jax.nnx import capture_max_logits, dot_product_attention

jax.config.update("jax_num_cpu_devices", 4)
MESH = jax.make_mesh((4,), ("fsdp",), (AxisType.Auto,))
WIDTH, HEADS, KEY_HEADS, MICRO_BATCHES = 32, 4, 2, 2


class Block(nnx.Module):
    """Grouped-query attention, then an MLP."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.query = nnx.LinearGeneral(WIDTH, (HEADS, 8), rngs=rngs)
        self.key = nnx.LinearGeneral(WIDTH, (KEY_HEADS, 8), rngs=rngs)
        self.value = nnx.LinearGeneral(WIDTH, (KEY_HEADS, 8), rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, 8), WIDTH, axis=(-2, -1), rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        """`dot_product_attention` records the maxima in this module."""
        y = self.norms[0](x)
        y = dot_product_attention(self.query(y), self.key(y), self.value(y), is_causal=True)
        x = x + self.out(y)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Model(nnx.Module):
    """Tokens to logits."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, WORDS, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        """Applies the layers one after the other."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(model, tokens):
    """Returns the loss, and the maxima at the paths of the attention modules."""
    logits, max_logits = capture_max_logits(model)(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(), max_logits


def rows(step):
    """A batch, one part on each device."""
    return jax.device_put(batch(step), NamedSharding(MESH, P("fsdp")))


def create():
    """FSDP: every leaf is cut along its first axis where four devices divide it."""
    model = Model(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    shardings = jax.tree.map(
        lambda x: NamedSharding(MESH, P("fsdp") if x.shape[0] % 4 == 0 else P()), params
    )
    nnx.update(model, jax.device_put(params, shardings))
    maxima = nnx.eval_shape(lambda model: loss_fn(model, batch(0))[1], model)
    tx = mc.muonclip(learning_rate=2e-3, qk_clip_threshold=20.0, param_shardings=shardings)
    tx = mc.metrics(tx, every=10, qk_clip_threshold=20.0)
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
    tx = mc.accumulate(tx, MICRO_BATCHES, max_logits=maxima, param_shardings=shardings)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, tokens):
    """One micro-batch; the optimizer steps after every second."""
    (loss, max_logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, tokens)
    optimizer.update(model, grads, max_logits=max_logits)
    return loss


model, optimizer = create()
losses = []
with SummaryWriter(tempfile.mkdtemp()) as board:
    for i in range(120):
        losses.append(step(model, optimizer, rows(i)))
        board.add_scalar("loss", float(losses[-1]), i)
        if (i + 1) % 20 == 0:
            figures = mc.read_metrics(optimizer.opt_state, nnx.state(model, nnx.Param))
            for name, value in figures.scalars(leaves=False).items():
                board.add_scalar(name, float(value), i)

params = nnx.state(model, nnx.Param)
check_routing(params, muon=r"blocks/\d/(query|key|value|out|up|down)/kernel$")
check_losses(losses)
graph = nnx.graphdef(model)
check_clip(params, nnx.jit(lambda params: loss_fn(nnx.merge(graph, params), batch(100))[1]))

both = {"model": model, "optimizer": optimizer}
folder = check_describe("nnx", nnx.state(both), params)
restored = dict(zip(both, create(), strict=True))
with ocp.StandardCheckpointer() as checkpointer:
    target = checkpoint.abstract_params(nnx.state(restored))
    nnx.update(restored, checkpointer.restore(folder, target))
for i in range(120, 124):
    np.testing.assert_array_equal(*(step(*pair.values(), rows(i)) for pair in (both, restored)))
print("resumed: the same losses, bit for bit")
