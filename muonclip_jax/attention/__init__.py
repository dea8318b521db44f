"""Attention that returns its maximum logits."""

from muonclip_jax.attention.dot_product import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
    attention_max_logits as attention_max_logits,
    dot_product_attention as dot_product_attention,
)
from muonclip_jax.attention.maxima import (
    merge_max_logits as merge_max_logits,
    only_max_logits as only_max_logits,
    reduce_max_logits as reduce_max_logits,
)
from muonclip_jax.attention.recording import (
    RecordingBeside as RecordingBeside,
    arguments_of as arguments_of,
    as_bool as as_bool,
    records as records,
    with_arguments_of as with_arguments_of,
)
