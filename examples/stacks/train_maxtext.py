"""MaxText: its own trainer and sharding, with MuonClip in place of its Muon and its QK-Clip.

python examples/stacks/train_maxtext.py
"""

import os
import tempfile
from pathlib import Path

os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # MaxText without the packages of Google Cloud

import jax
import maxtext
from flax import nnx
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train
from maxtext.utils import qk_clip_utils
from shared import check_routing

import muonclip_jax as mc

SETTINGS = {
    "run_name": "muonclip",
    "base_output_directory": tempfile.mkdtemp(),
    "model_name": "deepseek3-671b",
    "override_model_config": True,
    "hardware": "cpu",
    "attention": "dot_product",
    "dtype": "float32",
    "dataset_type": "synthetic",
    "enable_checkpointing": False,
    "skip_jax_distributed_system": True,
    "sparse_matmul": False,
    "megablox": False,
    "base_emb_dim": 32,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 4,
    "base_mlp_dim": 64,
    "base_moe_mlp_dim": 16,
    "base_num_decoder_layers": 2,
    "first_num_dense_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_routing_groups": -1,
    "topk_routing_group": -1,
    "mtp_num_layers": 0,
    "vocab_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_target_length": 16,
    "per_device_batch_size": 8,
    "steps": 10,
    "learning_rate": 5e-3,
    "opt_type": "muon",
    "use_qk_clip": True,
    "qk_clip_threshold": 20.0,
}
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
base = Path(maxtext.__file__).parent / "configs" / "base.yml"
arguments = [f"{name}={value}" for name, value in SETTINGS.items()]
config, recorder = train.initialize(["train", str(base), *arguments])
state = train.train_loop(config, recorder)
params = nnx.to_pure_dict(state)["model"]
check_routing(
    params, muon=r"attention/(w\w+|out)/kernel|(mlp|shared_experts)/w\w+/kernel|Block_0/w"
)
assert CLIPPED, "MaxText recorded no maxima"
print("clip: in the step of", ", ".join(CLIPPED))
