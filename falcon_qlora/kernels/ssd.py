"""Mamba-2's state space (SSD), convolution and gate for packed documents, in float32.

This is the reference, differentiable by autograd; `ssd_ops` has the operations of the fast path.

Letters of this file: T tokens of all documents, M heads of width P, state N, G groups of heads that share B
and C, Q tokens of a chunk, K taps of the convolution. Head m belongs to group ``m // (M / G)``.

Documents do not see each other: the convolution's taps stay within a document, and each begins with a state
of 0. A decay is the exponential of the sum of the logarithms between two tokens. Documents are separated by
comparing their indices, not by infinite decays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from falcon_qlora.kernels.chunks import SSD_TOKENS


@dataclass(frozen=True, kw_only=True, eq=False)
class StateSpace:
    """The parameters between ``in_proj`` and ``out_proj``, whose output and input have the columns

    | ``in_proj`` | z, MP | x, MP | B, GN | C, GN | Δ, M | ``out_proj`` | MP |
    |---|---|---|---|---|---|---|---|

    Attributes:
        groups: G.
        state: N.
        multipliers: float32 ``[2MP + 2GN + M]``, of ``in_proj``'s output.
        weight: of the convolution over x, B and C, ``[MP + 2GN, K]``; the last tap is for the token itself.
        bias: ``[MP + 2GN]``, or None.
        step_bias: ``[M]``, added to Δ before its softplus.
        limits: between which Δ is clamped.
        rate: float32 ``[M]``, A, below 0.
        skip: ``[M]``, D.
        norm: weight ``[MP]`` of the RMS norm over each group's channels, or None.
        epsilon: of the norm.
        norm_before_gate: whether y is normed, or else the product with the gate.
    """

    groups: int
    state: int
    multipliers: Tensor
    weight: Tensor
    bias: Tensor | None
    step_bias: Tensor
    limits: tuple[float, float]
    rate: Tensor
    skip: Tensor
    norm: Tensor | None
    epsilon: float
    norm_before_gate: bool

    @property
    def heads(self) -> int:
        return len(self.rate)

    @property
    def width(self) -> int:
        """MP."""
        return len(self.weight) - 2 * self.groups * self.state

    @property
    def head_size(self) -> int:
        """P."""
        return self.width // self.heads

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The columns of the gate, of the convolution and of Δ, of ``in_proj``'s output or one like it."""
        gates, channels, steps = projected.split([self.width, len(self.weight), self.heads], dim=-1)
        return gates, channels, steps


def mix(projected: Tensor, space: StateSpace, positions: Tensor) -> Tensor:
    """From ``in_proj``'s output to ``out_proj``'s input.

    Args:
        projected: ``[T, 2MP + 2GN + M]``.
        space: its parameters.
        positions: int64 ``[T]``, of each token in its document.

    Returns:
        float32 ``[T, MP]``.
    """
    z, channels, steps = space.split(projected.float() * space.multipliers)
    y = scan(convolve(channels, space.weight, space.bias, positions), steps, space, positions)
    return gated(y, z, space)


def scan(channels: Tensor, steps: Tensor, space: StateSpace, positions: Tensor) -> Tensor:
    """The state space with its skip.

    Args:
        channels: float32 ``[T, MP + 2GN]``, x, B and C, convolved.
        steps: float32 ``[T, M]``, Δ before its bias.
        space: its parameters.
        positions: int64 ``[T]``, of each token in its document.

    Returns:
        float32 ``[T, MP]``.
    """
    shared = space.groups * space.state
    x, b, c = channels.split([space.width, shared, shared], dim=1)
    x = rearrange(x, "t (m p) -> t m p", m=space.heads)
    b, c = (rearrange(each, "t (g n) -> t g n", g=space.groups) for each in (b, c))
    steps = F.softplus(steps + space.step_bias.float()).clamp(*space.limits)
    y = state_space(x, steps, space.rate, b, c, positions)
    return torch.addcmul(y, x, space.skip.float()[:, None]).flatten(1)


def gated(y: Tensor, z: Tensor, space: StateSpace) -> Tensor:
    """`gate` with the parameters of `space`."""
    return gate(
        y, z, space.norm, groups=space.groups, epsilon=space.epsilon, norm_before_gate=space.norm_before_gate
    )


def convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor) -> Tensor:
    """Causal convolution of each channel within its document, then SiLU.

    Args:
        inputs: float32 ``[T, channels]``.
        weight: ``[channels, K]``; the last tap is for the token itself.
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
    chunk: int = SSD_TOKENS,
) -> Tensor:
    """``y_t = h_t C_t`` with ``h_t = exp(step_t rate) h_{t-1} + step_t x_t B_tᵀ`` within each document.

    Args:
        x: float32 ``[T, M, P]``.
        step: float32 ``[T, M]``, Δ.
        rate: float32 ``[M]``, A, below 0.
        b: float32 ``[T, G, N]``.
        c: float32 ``[T, G, N]``.
        positions: int64 ``[T]``, of each token in its document.
        chunk: Q; it affects only rounding.

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
    # A token's document is identified by where it began; the last chunk's padding is one more document.
    began = chunks(places - positions, "(c q) -> c q", filler=tokens)

    # Within a chunk.
    decays = _decays(logs, began[:, None, None])  # [c, g, m, q, q]
    output = ((c @ b.mT)[:, :, None] * decays) @ scaled  # [c, g, m, q, p]
    # At a chunk's end: what its last document added in the chunk, and its state since that document began.
    added = rearrange(scaled * decays[..., -1, :, None], "c g m q p -> c g (m p) q") @ b
    between = _decays(rearrange(logs.sum(-1), "c g m -> g m c"), began[:, -1])  # [g, m, c, c]
    states = between @ rearrange(added, "c g (m p) n -> g m c (p n)", p=x.shape[2])
    # From earlier chunks, for the tokens of a document that began before this chunk.
    entering = rearrange(F.pad(states[:, :, :-1], (0, 0, 1, 0)), "g m c (p n) -> c g n (m p)", p=x.shape[2])
    first = rearrange(places[::chunk], "c -> c 1 1 1")
    since = logs.cumsum(-1).masked_fill(began[:, None, None] >= first, float("-inf")).exp()
    before = rearrange(c @ entering, "c g q (m p) -> c g m q p", p=x.shape[2])
    output = torch.addcmul(output, before, since[..., None])
    return rearrange(output, "c g m q p -> (c q) (g m) p")[:tokens]


def gate(
    y: Tensor, z: Tensor, weight: Tensor | None, *, groups: int, epsilon: float, norm_before_gate: bool
) -> Tensor:
    """``y * silu(z)``, with an RMS norm over each group of channels if `weight` is given.

    Args:
        y: float32 ``[T, MP]``.
        z: float32 ``[T, MP]``.
        weight: of the norm, ``[MP]``, or None.
        groups: G.
        epsilon: of the norm.
        norm_before_gate: whether y is normed, or else the product.

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
    """The share of token j's input left at i: ``exp(sum of logs of j < k <= i)``.

    It is 0 between documents, and where i < j.

    Args:
        logs: float32 ``[..., L]``.
        documents: int64, the document of each; broadcast to `logs`.

    Returns:
        float32 ``[..., L, L]``.
    """
    length = logs.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=logs.device).tril(-1)
    sums = logs[..., None].expand(*logs.shape, length).masked_fill(~later, 0.0).cumsum(-2)
    seen = (documents[..., :, None] == documents[..., None, :]).tril()
    return sums.masked_fill(~seen, float("-inf")).exp()
