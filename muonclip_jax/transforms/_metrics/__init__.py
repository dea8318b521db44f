"""Floor 4: what the optimizer does, as numbers in its state."""

from muonclip_jax.transforms._metrics.reading import (
    MuonMetrics as MuonMetrics,
    read_metrics as read_metrics,
)
from muonclip_jax.transforms._metrics.sample import MetricsSample as MetricsSample
from muonclip_jax.transforms._metrics.transformation import (
    MetricsState as MetricsState,
    metrics as metrics,
)
