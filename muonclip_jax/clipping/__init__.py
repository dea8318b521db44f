"""Gamma, and the clip of query and key weights."""

from muonclip_jax.clipping.clip import (
    QKClipInfo as QKClipInfo,
    apply_qk_clip as apply_qk_clip,
    qk_clip_info as qk_clip_info,
)
from muonclip_jax.clipping.describe import describe_attention as describe_attention
