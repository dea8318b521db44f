"""The Optax transformations."""

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
