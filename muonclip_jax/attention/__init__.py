"""Floor 3: attention that returns its largest logits."""

from muonclip_jax.attention.batches import (
    batched_attention as batched_attention,
    batched_max_logits as batched_max_logits,
)
from muonclip_jax.attention.dot_product import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
    dot_product_attention as dot_product_attention,
)
from muonclip_jax.attention.maxima import (
    attention_max_logits as attention_max_logits,
    merge_max_logits as merge_max_logits,
    only_max_logits as only_max_logits,
    reduce_max_logits as reduce_max_logits,
)
from muonclip_jax.attention.recording import (
    RecordingBeside as RecordingBeside,
    records as records,
)
