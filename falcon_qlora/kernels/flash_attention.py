"""FlashAttention-4 over packed documents, if that optional library is installed."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.kernels import libraries

_TRIED = 256  # tokens, of which long documents' kernel is chosen


@lru_cache
def flash_attention_4(
    device: torch.device, query_heads: int, kv_heads: int, head_dim: int
) -> libraries.Loaded[bool]:
    """The library, once it has attended both ways with these heads, which a run would have it compile anyway.

    Args:
        device: where the model is.
        query_heads, kv_heads, head_dim: Q, G and D.
    """
    if not libraries.usable(libraries.FLASH_ATTENTION_4):
        return libraries.Loaded()
    return libraries.load(libraries.FLASH_ATTENTION_4, partial(_try, device, query_heads, kv_heads, head_dim))


def _try(device: torch.device, query_heads: int, kv_heads: int, head_dim: int) -> bool:
    query, key, value = (
        torch.zeros(_TRIED, heads, head_dim, dtype=torch.bfloat16, device=device)
        for heads in (query_heads, kv_heads, kv_heads)
    )
    documents = torch.tensor([0, _TRIED], dtype=torch.int32, device=device), _TRIED, 1.0
    output, log_sum_exp = forward(query, key, value, *documents)
    of_query, *_ = backward(output, query, key, value, output, log_sum_exp, *documents)
    of_query.sum().item()  # an error of the GPU's shows when it is waited for
    return True


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
    from flash_attn.cute import interface

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
    from flash_attn.cute import interface

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
