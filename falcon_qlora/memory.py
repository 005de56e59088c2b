"""What a training step takes in memory, from the configuration alone. No tensors.

Counted are the activations that a backward pass needs, the gradients, the optimizer, and what exists for a
moment: a block's weights dequantized in both directions, a piece of the logits. Measured on an H200 for 7B
without recomputation, in bfloat16: 2.20 MB a token with fast blocks, 3.92 without them (10^6 bytes).
"""

from __future__ import annotations

from transformers import FalconConfig

from falcon_qlora.models.falcon import linear_shapes

GIB = 2**30

# Measured: the reference path also keeps the outputs of norms and GELU, and copies of inputs.
_REFERENCE_FACTOR = 1.9
_HEAD_CHUNK_TOKENS = 1024
# These two are fitted to the measurements: of a block's activations, and the kernels' and libraries' own.
_WORKING_BLOCKS = 2.5
_UNCOUNTED_BYTES = 2 * GIB
_USABLE_SHARE = 0.92


def activation_bytes_per_token(
    config: FalconConfig, *, fast: bool, recompute: bool, lora_rank: int = 0, value_bytes: int = 2
) -> float:
    """Bytes that one token's activations take from the forward to the backward pass, over all blocks.

    Args:
        config: the model.
        fast: whether the blocks run as single functions.
        recompute: whether only the blocks' inputs are kept.
        lora_rank: of the adapter on every linear.
        value_bytes: of an activation.
    """
    if recompute:
        return config.num_hidden_layers * config.hidden_size * value_bytes
    return config.num_hidden_layers * _block_bytes_per_token(config, fast, lora_rank, value_bytes)


def step_bytes(
    config: FalconConfig,
    *,
    tokens: int,
    trainable: int,
    fast: bool,
    recompute: bool,
    lora_rank: int = 0,
    value_bytes: int = 2,
    optimizer_bytes: int = 8,
    processes: int = 1,
) -> int:
    """Bytes that a step takes beyond the loaded model and its adapter.

    Args:
        config: the model.
        tokens: of one micro batch.
        trainable: parameters, in float32.
        fast, recompute, lora_rank, value_bytes: as in `activation_bytes_per_token`.
        optimizer_bytes: of the optimizer's state for one parameter.
        processes: above 1, DistributedDataParallel keeps buckets of the gradients' size.
    """
    activations = tokens * activation_bytes_per_token(
        config, fast=fast, recompute=recompute, lora_rank=lora_rank, value_bytes=value_bytes
    )
    # What one block's backward works with; where they are recomputed, its activations too.
    working = tokens * _block_bytes_per_token(config, True, lora_rank, value_bytes)
    working *= _WORKING_BLOCKS + recompute
    shapes = linear_shapes(config).values()
    weights = 2 * sum(out * into for out, into in shapes) * value_bytes
    logits = _HEAD_CHUNK_TOKENS * config.vocab_size * (2 * 4 + value_bytes)
    gradients = trainable * (4 + optimizer_bytes + (4 if processes > 1 else 0))
    return int(activations + working + weights + logits + gradients) + _UNCOUNTED_BYTES


def must_recompute(needed_bytes: int, free_bytes: int) -> bool:
    """Whether a step that would take `needed_bytes` without recomputation is too much for `free_bytes`."""
    return needed_bytes > _USABLE_SHARE * free_bytes


def _block_bytes_per_token(config: FalconConfig, fast: bool, lora_rank: int, value_bytes: int) -> float:
    shapes = linear_shapes(config)
    kept = 2 * config.hidden_size + shapes["query_key_value"][0] + shapes["dense_h_to_4h"][0]
    statistics = 4 * config.num_attention_heads + 8
    total = (kept + len(shapes) * lora_rank) * value_bytes + statistics
    return total if fast else _REFERENCE_FACTOR * total
