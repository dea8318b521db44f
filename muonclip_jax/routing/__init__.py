"""Which leaf of a tree is which matrix."""

from muonclip_jax._specs import (
    MatrixSpec as MatrixSpec,
    Split as Split,
    batch_axes as batch_axes,
    normalize_spec as normalize_spec,
    normalized_axes as normalized_axes,
)
from muonclip_jax.heads.layouts import AttentionLayout as AttentionLayout, Projection as Projection
from muonclip_jax.routing.labels import (
    decay_mask as decay_mask,
    describe_labels as describe_labels,
    infer_dimension_numbers as infer_dimension_numbers,
    label_params as label_params,
    resolve_muon_specs as resolve_muon_specs,
    resolve_specs as resolve_specs,
)
from muonclip_jax.routing.rules import MatrixRules as MatrixRules, as_rules as as_rules
