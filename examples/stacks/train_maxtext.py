"""MaxText: its own trainer and sharding, with MuonClip in place of its Muon and its QK-Clip.

python examples/stacks/train_maxtext.py
"""

import os
import tempfile
from pathlib import Path

os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # MaxText without the packages of Google Cloud
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import maxtext
from flax import nnx
from maxtext.layers.attention_op import AttentionOp
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train
from maxtext.utils import qk_clip_utils, train_utils
from shared import check_clip, check_losses, check_routing, describe

import muonclip_jax as mc

COMMON = {
    "run_name": "muonclip",
    "override_model_config": True,
    "hardware": "cpu",
    "attention": "dot_product",
    "dtype": "float32",
    "dataset_type": "synthetic",
    "async_checkpointing": False,
    "skip_jax_distributed_system": True,
    "base_emb_dim": 32,
    "base_num_query_heads": 4,
    "base_mlp_dim": 64,
    "vocab_size": 32,
    "max_target_length": 16,
    "per_device_batch_size": 2,
    "ici_fsdp_parallelism": 4,
    "steps": 60,
}
DEEPSEEK = COMMON | {
    "model_name": "deepseek3-671b",
    "base_num_kv_heads": 4,
    "base_moe_mlp_dim": 16,
    "base_num_decoder_layers": 2,
    "first_num_dense_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_routing_groups": -1,
    "topk_routing_group": -1,
    "mtp_num_layers": 0,
    "sparse_matmul": False,
    "megablox": False,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "learning_rate": 5e-3,
    "opt_type": "muon",
    "use_qk_clip": True,
    "qk_clip_threshold": 20.0,
}
GROUPED = COMMON | {"base_num_kv_heads": 2, "head_dim": 8, "base_num_decoder_layers": 4}
#: Grouped queries in scanned layers, in single layers, and in scans of a local and a global layer.
#: Gemma 2's soft cap is off: MaxText records the logits behind it, which no clip can move exactly.
MODELS = (
    {"model_name": "llama3-8b"},
    {"model_name": "llama3-8b", "scan_layers": False},
    {"model_name": "gemma2-9b", "attn_logits_soft_cap": 0.0},
)
CLIPPED: list[str] = []  # attention blocks of the step that was traced


def get_optimizer(config, learning_rate_schedule, model=None, mesh=None):
    """Takes the place of MaxText's; the clip follows in `apply_qk_clip`."""
    shardings = jax.tree.map(lambda x: x.sharding, nnx.state(model, nnx.Param))
    return mc.muonclip(
        learning_rate_schedule,
        weight_decay=config.muon_weight_decay,
        consistent_rms=config.muon_consistent_rms or 0.2,
        mu_dtype=config.mu_dtype,
        param_shardings=shardings if mesh is not None and mesh.size > 1 else None,
        qk_clip_threshold=None,
    )


def maxima_of(intermediates):
    """MaxText records `(layers, batch, heads)`; the batch is reduced here."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(intermediates):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if "max_logits" in names:
            module = [n for n in names[: names.index("max_logits")] if n != "attention_op"]
            found["/".join(module)] = leaf.max(axis=-2)
    return found


def apply_qk_clip(state, intermediates, config):
    """Takes the place of MaxText's: a factor for every layer, and attention other than latent."""
    params, maxima = nnx.state(state.model, nnx.Param), maxima_of(intermediates)
    params, _ = mc.apply_qk_clip(params, maxima, threshold=config.qk_clip_threshold)
    nnx.update(state.model, params)
    CLIPPED[:] = maxima
    return state


optimizers.get_optimizer = get_optimizer
qk_clip_utils.apply_qk_clip_nnx = apply_qk_clip
BASE = Path(maxtext.__file__).parent / "configs" / "base.yml"


def setup(settings):
    """Returns configuration and model, and the forward pass: parameters -> loss and maxima."""
    settings = settings | {"base_output_directory": tempfile.mkdtemp()}
    arguments = [f"{name}={value}" for name, value in settings.items()]
    config, recorder = train.initialize(["train", str(BASE), *arguments])
    made = train_utils.setup_train_loop(config, recorder)
    mesh, data, model = made[4], next(made[6]), made[-1].model
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def forward(params):
        new = nnx.merge(graph, params, rest, copy=True)
        loss, aux = train.loss_fn(new, config, dict(data), None, None)
        return loss, maxima_of(aux["intermediate_outputs"])

    return config, recorder, mesh, model, params, forward


config, recorder, mesh, model, untrained, forward = setup(DEEPSEEK)
params = nnx.to_pure_dict(train.train_loop(config, recorder))["model"]
check_routing(
    params, muon=r"attention/(w\w+|out)/kernel|(mlp|shared_experts)/w\w+/kernel|Block_0/w"
)
assert CLIPPED, "MaxText recorded no maxima"
trained = nnx.state(model)
nnx.replace_by_pure_dict(trained, params)
trained = trained.filter(nnx.Param)
with jax.set_mesh(mesh):
    check_losses([forward(untrained)[0], forward(trained)[0]])
    check_clip(trained, lambda params: forward(params)[1])

# Other attention than latent: MaxText's operator records its maxima where it is told to.
attend = AttentionOp.__call__


def attend_and_record(self, *args, **kwargs):
    """Only MaxText's latent attention passes this argument."""
    return attend(self, *args, **kwargs | {"record_max_logits": True})


AttentionOp.__call__ = attend_and_record
for settings in MODELS:
    _, _, mesh, _, params, forward = setup(GROUPED | settings)
    with jax.set_mesh(mesh):
        check_clip(params, lambda params, forward=forward: forward(params)[1])

describe("maxtext", Path(config.checkpoint_dir), trained)
