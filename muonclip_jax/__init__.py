"""Muon with QK-Clip for JAX, as composable Optax transformations."""

from optax.contrib import MuonDimensionNumbers as MuonDimensionNumbers

from muonclip_jax._config import MuonClipConfig as MuonClipConfig
from muonclip_jax.attention.dot_product import (
    attention_max_logits as attention_max_logits,
    dot_product_attention as dot_product_attention,
)
from muonclip_jax.attention.maxima import (
    merge_max_logits as merge_max_logits,
    reduce_max_logits as reduce_max_logits,
)
from muonclip_jax.clipping import (
    QKClipInfo as QKClipInfo,
    apply_qk_clip as apply_qk_clip,
    describe_attention as describe_attention,
    qk_clip_info as qk_clip_info,
)
from muonclip_jax.matrices import describe_cost as describe_cost
from muonclip_jax.newton_schulz import orthogonalize as orthogonalize
from muonclip_jax.optimizers import muon as muon, muonclip as muonclip
from muonclip_jax.routing import (
    AttentionLayout as AttentionLayout,
    MatrixRules as MatrixRules,
    MatrixSpec as MatrixSpec,
    Projection as Projection,
    Split as Split,
    describe_labels as describe_labels,
    infer_dimension_numbers as infer_dimension_numbers,
    label_params as label_params,
)
from muonclip_jax.sharding.mesh_shardings import Distribution as Distribution
from muonclip_jax.transforms._accumulate import (
    AccumulateState as AccumulateState,
    accumulate as accumulate,
)
from muonclip_jax.transforms._figures import (
    MetricsState as MetricsState,
    MuonMetrics as MuonMetrics,
)
from muonclip_jax.transforms._matrix_axes import (
    MatrixAxes as MatrixAxes,
    matrix_axes as matrix_axes,
    scale_by_shape as scale_by_shape,
)
from muonclip_jax.transforms._metrics import metrics as metrics, read_metrics as read_metrics
from muonclip_jax.transforms._orthogonalize_updates import (
    orthogonalize_updates as orthogonalize_updates,
)
from muonclip_jax.transforms._qk_clip import (
    QKClipState as QKClipState,
    clip_until as clip_until,
    qk_clip as qk_clip,
)
from muonclip_jax.transforms._scale_by_muon import (
    MuonState as MuonState,
    scale_by_muon as scale_by_muon,
)
from muonclip_jax.transforms._variants import (
    HyperballState as HyperballState,
    NeuronRmsState as NeuronRmsState,
    add_weight_decay as add_weight_decay,
    hyperball as hyperball,
    scale_by_neuron_rms as scale_by_neuron_rms,
)
