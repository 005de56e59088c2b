"""Mamba-2's state space (SSD) and what stands around it, of packed documents, in float32.

Letters of this file: T tokens of all documents, M heads of width P, state N, G groups of heads that share B
and C, Q tokens of a chunk, K taps of the convolution. Head m is of group ``m // (M / G)``.

A document sees nothing of another: the convolution has the taps of the same document only, and a state begins
at 0 with each. Every decay is the sum of the logarithms between two tokens, taken before its exponential;
tokens of two documents are told apart by comparing them, not by a decay that would be infinite.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# At 7B's sizes a chunk's decays (Q a token and head) and its states (PN / Q) take least together.
CHUNK_TOKENS = 128


def convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor) -> Tensor:
    """Causal convolution of each channel within its document, then SiLU.

    Args:
        inputs: float32 ``[T, channels]``.
        weight: ``[channels, K]``, the last tap of the token itself.
        bias: ``[channels]``, or None.
        positions: int64 ``[T]``, of each token in its document.

    Returns:
        float32 ``[T, channels]``.
    """
    taps = weight.float().unbind(1)
    output = inputs * taps[-1] if bias is None else torch.addcmul(bias.float(), inputs, taps[-1])
    for back, tap in enumerate(reversed(taps[:-1]), start=1):
        earlier = F.pad(inputs, (0, 0, back, 0))[: len(inputs)]
        output = torch.addcmul(output, earlier.masked_fill((positions < back)[:, None], 0.0), tap)
    return F.silu(output)


def state_space(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    positions: Tensor,
    *,
    chunk: int = CHUNK_TOKENS,
) -> Tensor:
    """``y_t = h_t C_t`` with ``h_t = exp(step_t rate) h_{t-1} + step_t x_t B_tᵀ`` within each document.

    Args:
        x: float32 ``[T, M, P]``.
        step: float32 ``[T, M]``, Δ.
        rate: float32 ``[M]``, A, below 0.
        b: float32 ``[T, G, N]``.
        c: float32 ``[T, G, N]``.
        positions: int64 ``[T]``, of each token in its document.
        chunk: Q; it changes no result but for rounding.

    Returns:
        float32 ``[T, M, P]``.
    """
    tokens, groups = len(x), b.shape[1]
    chunk = min(chunk, tokens)
    places = torch.arange(tokens, device=x.device)

    def chunks(each: Tensor, into: str, filler: int = 0) -> Tensor:
        padded = F.pad(each, (*(0, 0) * (each.dim() - 1), 0, -tokens % chunk), value=filler)
        return rearrange(padded, into, q=chunk, **({"g": groups} if "(g m)" in into else {}))

    scaled = chunks(x * step[..., None], "(c q) (g m) p -> c g m q p")
    logs = chunks(step * rate, "(c q) (g m) -> c g m q")
    b, c = chunks(b, "(c q) g n -> c g q n"), chunks(c, "(c q) g n -> c g q n")
    # Where its document began tells a token's document; what fills up the last chunk is one more.
    began = chunks(places - positions, "(c q) -> c q", filler=tokens)

    # Within a chunk.
    decays = _decays(logs, began[:, None, None])  # [c, g, m, q, q]
    output = ((c @ b.mT)[:, :, None] * decays) @ scaled  # [c, g, m, q, p]
    # At a chunk's end: what its last document has added, and all that has come to it since that began.
    added = rearrange(scaled * decays[..., -1, :, None], "c g m q p -> c g (m p) q") @ b
    between = _decays(rearrange(logs.sum(-1), "c g m -> g m c"), began[:, -1])  # [g, m, c, c]
    states = between @ rearrange(added, "c g (m p) n -> g m c (p n)", p=x.shape[2])
    # From before a chunk, for the tokens of the document that was there already.
    entering = rearrange(F.pad(states[:, :, :-1], (0, 0, 1, 0)), "g m c (p n) -> c g n (m p)", p=x.shape[2])
    first = rearrange(places[::chunk], "c -> c 1 1 1")
    since = logs.cumsum(-1).masked_fill(began[:, None, None] >= first, float("-inf")).exp()
    before = rearrange(c @ entering, "c g q (m p) -> c g m q p", p=x.shape[2])
    output = torch.addcmul(output, before, since[..., None])
    return rearrange(output, "c g m q p -> (c q) (g m) p")[:tokens]


def gate(
    y: Tensor, z: Tensor, weight: Tensor | None, *, groups: int, epsilon: float, norm_before_gate: bool
) -> Tensor:
    """``y * silu(z)``, with an RMS norm over each group of channels where there is one.

    Args:
        y: float32 ``[T, MP]``.
        z: float32 ``[T, MP]``.
        weight: of the norm, ``[MP]``, or None.
        groups: G.
        epsilon: of the norm.
        norm_before_gate: whether the norm is of y, else of the product.

    Returns:
        float32 ``[T, MP]``.
    """
    if weight is None:
        return y * F.silu(z)
    normed = y if norm_before_gate else y * F.silu(z)
    normed = F.rms_norm(normed.unflatten(1, (groups, -1)), (y.shape[1] // groups,), eps=epsilon)
    normed = normed.flatten(1) * weight.float()
    return normed * F.silu(z) if norm_before_gate else normed


def _decays(logs: Tensor, documents: Tensor) -> Tensor:
    """How much of what came at j is left at i: ``exp(sum of logs of j < k <= i)``, or 0.

    It is 0 of another document, and where i < j.

    Args:
        logs: float32 ``[..., L]``.
        documents: int64, which document each is of; broadcast to `logs`.

    Returns:
        float32 ``[..., L, L]``.
    """
    length = logs.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=logs.device).tril(-1)
    sums = logs[..., None].expand(*logs.shape, length).masked_fill(~later, 0.0).cumsum(-2)
    seen = (documents[..., :, None] == documents[..., None, :]).tril()
    return sums.masked_fill(~seen, float("-inf")).exp()
