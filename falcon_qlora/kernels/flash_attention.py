"""FlashAttention-4 over packed documents, if that optional library is installed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.kernels import libraries


@lru_cache
def flash_attention_4() -> Any | None:
    """The library's interface; None if it is missing or does not load, or if the GPU is older than Hopper."""
    if not libraries.usable("flash_attn"):
        return None
    try:
        from flash_attn.cute import interface
    except (ImportError, TypeError, AttributeError):  # another version of flash_attn or of its dependencies
        return None
    return interface


def forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents.

    Args:
        query: ``[T, Q, D]``, bfloat16, any row stride; so are `key` and `value`.
        key: ``[T, G, D]``.
        value: ``[T, G, D]``.
        starts: int32 ``[documents + 1]``, where each document starts, and the end.
        longest: tokens of the longest document.
        scale: of the scores.

    Returns:
        ``[T, Q, D]`` and the log-sum-exp of the scores, float32 ``[Q, T]``.
    """
    interface = flash_attention_4()
    assert interface is not None
    output, log_sum_exp, *_ = interface._flash_attn_fwd(
        query, key, value, **_documents(starts, longest, scale), return_lse=True
    )
    return output, log_sum_exp


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; arguments as in `forward`."""
    interface = flash_attention_4()
    assert interface is not None
    how = {
        **_documents(starts, longest, scale),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    of_query, of_key, of_value = interface._flash_attn_bwd(
        query, key, value, output, grad, log_sum_exp, **how
    )
    return of_query, of_key, of_value


def _documents(starts: Tensor, longest: int, scale: float) -> dict[str, Any]:
    return {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "softmax_scale": scale,
        "causal": True,
    }
