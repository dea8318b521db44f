"""Floor 4: what the optimizer does, as numbers in its state."""

from muonclip_jax.transforms.metrics.reading import (
    MuonMetrics as MuonMetrics,
    read_metrics as read_metrics,
)
from muonclip_jax.transforms.metrics.transformation import (
    MetricsSample as MetricsSample,
    MetricsState as MetricsState,
    metrics as metrics,
)
