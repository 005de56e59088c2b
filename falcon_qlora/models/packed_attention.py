"""Exact attention within each of several documents laid end to end.

Shapes: T tokens of all documents, Q query heads, G key/value heads, D head size, L longest document.

Recent GPUs run one variable-length kernel over the packed tokens. Elsewhere the documents are laid out as
right-padded batches for PyTorch's own causal attention. Both compute the same, and neither builds a mask.
ALiBi needs none either: its bias depends on the key alone, so it becomes one more coordinate of the keys,
multiplied by a one in every query.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from falcon_qlora.processes.devices import FIRST_WITH_BFLOAT16


@dataclass(frozen=True)
class Sequences:
    """T tokens of several documents laid end to end, as one row.

    Attributes:
        cu_seqlens: int32 ``[documents + 1]``, where each document starts, on the model's device.
        position_ids: int64 ``[1, T]``, restarting in every document.
        lengths: tokens of each document, on the host.
        max_length: tokens of the longest document.
        wanted: int64 ``[N]``, the tokens whose output is wanted of a block, each once; it may leave out the
            others. None: all.
    """

    cu_seqlens: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    max_length: int
    wanted: Tensor | None = None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Sequences:
        """Build from the documents' lengths in tokens, each at least 1."""
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        starts[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        return cls(starts.to(device), positions.to(device), tuple(map(int, lengths)), max(lengths))

    @cached_property
    def padded_groups(self) -> tuple[PaddedGroup, ...]:
        """The documents grouped by length, at most half padding unless short; the same for every block."""
        return _group_by_length(self.lengths, self.position_ids.device)

    @cached_property
    def group_order(self) -> Tensor:
        """int64 ``[T]``: where each token stands when the groups' tokens are laid end to end."""
        return torch.argsort(torch.cat([group.tokens for group in self.padded_groups]))


@dataclass(frozen=True)
class PaddedGroup:
    """Documents that are attended to as one right-padded batch.

    Attributes:
        documents: how many.
        length: positions of the longest.
        tokens: int64 ``[n]``, the group's tokens among the T.
        slots: int64 ``[n]``, their places in the flattened ``[documents * length]`` batch.
    """

    documents: int
    length: int
    tokens: Tensor
    slots: Tensor


_SHORT = 32  # documents up to this length share a group whatever the padding: it costs less than another call


def _group_by_length(lengths: tuple[int, ...], device: torch.device) -> tuple[PaddedGroup, ...]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    by_length = sorted(range(len(lengths)), key=lambda document: (-lengths[document], document))
    groups = []
    while by_length:
        longest = lengths[by_length[0]]
        inside = [d for d in by_length if longest <= max(_SHORT, 2 * lengths[d])]
        by_length = by_length[len(inside) :]
        inside.sort()
        tokens = torch.cat([torch.arange(starts[d], starts[d + 1]) for d in inside])
        slots = torch.cat([torch.arange(lengths[d]) + row * longest for row, d in enumerate(inside)])
        groups.append(PaddedGroup(len(inside), longest, tokens.to(device), slots.to(device)))
    return tuple(groups)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate ``[T, heads, D]`` by its tokens' positions: cosines and sines ``[T, 1, D]``."""
    half = heads.shape[-1] // 2
    turned = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
    return (heads * cosine) + (turned * sine)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    multiplier: float = 1.0,
) -> Tensor:
    """Causal attention within each document, scaled by 1/sqrt(D).

    Args:
        query: ``[T, Q, D]``.
        key: ``[T, G, D]``.
        value: ``[T, G, D]``.
        sequences: where the documents lie.
        bias: ``[T, Q]``, added to every score of a key before scaling, or None.
        dropout: probability of dropping an attention weight.
        multiplier: of the scores beside 1/sqrt(D).

    Returns:
        ``[T, Q, D]``.
    """
    head_dim = query.shape[-1]
    scale = multiplier / math.sqrt(head_dim)
    if bias is not None:
        query, key, value = _bias_as_a_coordinate(query, key, value, bias)
    if takes_varlen(query.device, query.dtype, query.shape[-1], dropout):
        starts, longest = sequences.cu_seqlens, sequences.max_length
        output: Any = varlen_attn(
            query, key, value, starts, starts, longest, longest, scale=scale, **_varlen_options()
        )
    else:
        output = _padded(query, key, value, sequences, scale, dropout)
    return output[..., :head_dim]


def _bias_as_a_coordinate(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads = query.shape[1]
    key, value = one_for_each_query_head(key, heads), one_for_each_query_head(value, heads)
    width = 8 - query.shape[-1] % 8  # at least one; the kernels want multiples of eight
    ones = query.new_zeros(width)
    ones[0] = 1
    query = torch.cat([query, ones.expand(*query.shape[:2], width)], dim=-1)
    column = F.pad(bias.to(key.dtype)[..., None], (0, width - 1))
    return query, torch.cat([key, column], dim=-1), F.pad(value, (0, width))


def one_for_each_query_head(heads: Tensor, query_heads: int) -> Tensor:
    """``[..., G, D]`` → ``[..., Q, D]``, a view where G is 1."""
    kv_heads = heads.shape[-2]
    if kv_heads == query_heads:
        return heads
    each = heads.unsqueeze(-2).expand(*heads.shape[:-1], query_heads // kv_heads, heads.shape[-1])
    return each.flatten(-3, -2)


# GPUs with less shared memory, on which the backward kernel for wider heads was never tried.
_WIDEST_HEAD = {(8, 6): 192, (8, 9): 192, (12, 0): 192}


def takes_varlen(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> bool:
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and dropout == 0.0
        and _capability(device) >= FIRST_WITH_BFLOAT16  # older ones have no such kernel, in float16 either
        and head_dim <= _WIDEST_HEAD.get(_capability(device), 256)
    )


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def _varlen_options() -> dict[str, Any]:
    # Newer PyTorch releases must be told that heads are shared; older ones have no such argument.
    shared = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return {"window_size": (-1, 0), **shared}


def _padded(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, dropout: float
) -> Tensor:
    heads = query.shape[1]
    outputs = []
    for group in sequences.padded_groups:
        output = F.scaled_dot_product_attention(
            _pad(query, group, heads),
            _pad(key, group, heads),
            _pad(value, group, heads),
            is_causal=True,
            dropout_p=dropout,
            scale=scale,
        )  # [documents, Q, L, D]; padding's output is not read, and nothing attends to padding
        outputs.append(output.transpose(1, 2).flatten(0, 1).index_select(0, group.slots))
    return torch.cat(outputs).index_select(0, sequences.group_order)


def _pad(packed: Tensor, group: PaddedGroup, query_heads: int) -> Tensor:
    """``[T, heads, D]`` → ``[documents, Q, L, D]``."""
    batch = packed.new_zeros(group.documents * group.length, *packed.shape[1:])
    batch = batch.index_copy(0, group.slots, packed.index_select(0, group.tokens))
    batch = one_for_each_query_head(batch, query_heads)
    return batch.unflatten(0, (group.documents, group.length)).transpose(1, 2)
