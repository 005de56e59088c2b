"""Triton's form of `ssd_ops`' scan, in chunks of Q tokens; they affect only rounding.

Forward: `_sum_decays` takes Δ and the sums c of ΔA within each chunk and document. `_match` takes C Bᵀ of
each chunk and group. `_walk` goes through each document and writes the state that enters each of its chunks
but the first. `_outputs` adds up what comes from within a chunk and from that state. States are summed in
float32. They are written in the activations' dtype, in which they are operands of products.

Backward, the states are recomputed. `_walk` goes the other way for the gradients G of the states that leave a
chunk, and `_outputs` adds up dx. With S_ij = Δ_j exp(c_i - c_j) (C_i·B_j) (dy_i·x_j) within a chunk and
document:
- `_of_scores` computes the sums of S along rows and columns, and the gradient of C Bᵀ, summed over heads.
- `_of_shared` computes dB and dC, whose terms through the states it sums over heads. Products of these terms
  with B and C are the decays' gradients through the states.
- `_of_steps` computes dΔ. The gradient of ΔA at token k is the sum of S_ij over j < k <= i: of the later row
  sums minus the later column sums, within a document. Both are of one S, so they cancel exactly enough. What
  entered a chunk is one more column of S, and what leaves it one more row.

A product's result is never transposed in registers for the next product: Triton before 3.7.1 computes that
wrong on Hopper. C Bᵀ and its gradient go through memory, and are read the other way round where needed.

Bytes a token at Falcon-H1-7B's sizes (bfloat16, M 24, P 128, N 256, G 1, Q 64), of one long document. States
are 24,576 of them. They are written once and read once forward. Backward both states and their gradients are
written, and gradients are read once more. C Bᵀ, Δ and sums of each head are read once.

| | states | x, B, C, y and their gradients | the rest |
|---|---|---|---|
| forward | 49,152 | `_match` 1,024, `_walk` 6,656, `_outputs` 12,800 | 1,400 |
| backward | 122,880 | `_match` 1,024, `_walk` 13,312, `_outputs` 12,800, the others 26,624 | 12,000 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.chunks import FAST_SSD_TOKENS
from falcon_qlora.kernels.rows import read
from falcon_qlora.kernels.ssd import StateSpace

_CHUNK = FAST_SSD_TOKENS  # Q
_HEADS_A_PROGRAM = 6  # of `_of_scores`, which sums a gradient over them
_WALK: dict[str, Any] = {"ROWS": 64, "LANES": 64, "num_warps": 4, "num_stages": 3}
_OUTPUTS: dict[str, Any] = {"LANES": 64, "num_warps": 8, "num_stages": 3}
_OF_SCORES: dict[str, Any] = {"num_warps": 4, "num_stages": 1}
# More lanes do not fit into the registers of GPUs before Hopper.
_OF_SHARED: dict[str, Any] = {"LANES": 32, "num_warps": 4, "num_stages": 2}
_STEPS: dict[str, Any] = {"num_warps": 8}


def scan(channels: Tensor, steps: Tensor, space: StateSpace, positions: Tensor, starts: Tensor) -> Tensor:
    """See `ssd_ops.scan`."""
    y = torch.empty(len(channels), space.width, dtype=channels.dtype, device=channels.device)
    if not channels.numel():
        return y
    parts = _Parts.of(channels, steps, space, positions, starts)
    x, _, c = parts.inputs
    parts.add_up(x, c, parts.states(), y, reverse=False)
    return y


def scan_backward(
    grad: Tensor,
    channels: Tensor,
    steps: Tensor,
    space: StateSpace,
    positions: Tensor,
    starts: Tensor,
    of_steps: Tensor,
) -> Tensor:
    """See `ssd_ops.scan_backward`."""
    of_channels = torch.empty(channels.shape, dtype=channels.dtype, device=channels.device)
    if not channels.numel():
        return of_channels
    grad = grad.contiguous()
    parts = _Parts.of(channels, steps, space, positions, starts)
    states, gradients = parts.states(), parts.states(grad)
    x, b, c = parts.inputs
    dx, db, dc = parts.split(of_channels)
    parts.add_up(grad, b, gradients, dx, reverse=True)
    counts = len(x), space.heads, space.groups
    blocks = triton.cdiv(space.heads // space.groups, _HEADS_A_PROGRAM)
    of_inner = parts.empty(blocks, *parts.inner.shape)
    direct, within = (torch.empty_like(parts.steps) for _ in range(2))
    _of_scores[(space.groups * blocks, parts.chunks)](
        grad, x, parts.steps, parts.sums, parts.inner, positions, of_inner, direct, within, x.stride(0),
        *counts, HEADS=_HEADS_A_PROGRAM, CHUNK=_CHUNK, WIDTH=space.head_size, **_OF_SCORES,
    )  # fmt: skip
    options = _fitted(_OF_SHARED, space)
    lanes = space.state // options["LANES"]
    entered, left = (parts.empty(lanes, *parts.steps.shape) for _ in range(2))
    past = parts.empty(lanes, parts.chunks, space.heads)
    _of_shared[(space.groups * lanes, parts.chunks)](
        grad, x, b, c, parts.steps, parts.sums, of_inner, states, gradients, positions,
        db, dc, entered, left, past, x.stride(0), db.stride(0), *counts,
        BLOCKS=blocks, **parts.sizes, **options,
    )  # fmt: skip
    _of_steps[(parts.chunks,)](
        steps, *parts.of_steps, parts.steps, direct, within, entered, left, past, positions, of_steps,
        steps.stride(0), of_steps.stride(0), *counts[:2], *space.limits, BLOCKS=lanes, CHUNK=_CHUNK,
        HEADS=_lanes_of_heads(space), **_STEPS,
    )  # fmt: skip
    return of_channels


@dataclass(frozen=True, eq=False)
class _Parts:
    """What forward and backward both compute.

    Attributes:
        space: the parameters.
        inputs: x ``[T, MP]``, B and C ``[T, GN]``, with one row stride.
        positions: int64 ``[T]``.
        starts: int32 ``[documents + 1]``.
        of_steps: multipliers, biases and A, ``[M]`` each.
        steps: float32 ``[chunks, M, Q]``, Δ, 0 past the last token.
        sums: float32 ``[chunks, M, Q]``, c.
        inner: float32 ``[chunks, G, Q, Q]``, C Bᵀ.
    """

    space: StateSpace
    inputs: tuple[Tensor, Tensor, Tensor]
    positions: Tensor
    starts: Tensor
    of_steps: tuple[Tensor, Tensor, Tensor]
    steps: Tensor
    sums: Tensor
    inner: Tensor

    @classmethod
    def of(
        cls, channels: Tensor, steps: Tensor, space: StateSpace, positions: Tensor, starts: Tensor
    ) -> _Parts:
        if channels.stride(1) != 1 or steps.stride(1) != 1:
            raise ValueError("expected a contiguous last dimension")
        tokens = len(channels)
        chunks = triton.cdiv(tokens, _CHUNK)
        shape: dict[str, Any] = {"dtype": torch.float32, "device": channels.device}
        of_steps = space.split(space.multipliers)[2], space.step_bias, space.rate
        sizes, sums = (torch.empty(chunks, space.heads, _CHUNK, **shape) for _ in range(2))
        _sum_decays[(chunks,)](
            steps, *of_steps, positions, sizes, sums, steps.stride(0), tokens, space.heads, *space.limits,
            CHUNK=_CHUNK, HEADS=_lanes_of_heads(space), **_STEPS,
        )  # fmt: skip
        inner = torch.empty(chunks, space.groups, _CHUNK, _CHUNK, **shape)
        shared = space.groups * space.state
        x, b, c = channels.split([space.width, shared, shared], dim=1)
        _match[(space.groups, chunks)](
            b, c, inner, b.stride(0), tokens, CHUNK=_CHUNK, STATE=space.state, **_fitted(_OUTPUTS, space)
        )
        return cls(space, (x, b, c), positions, starts, of_steps, sizes, sums, inner)

    @property
    def chunks(self) -> int:
        return len(self.steps)

    @property
    def sizes(self) -> dict[str, int]:
        return {"CHUNK": _CHUNK, "WIDTH": self.space.head_size, "STATE": self.space.state}

    def split(self, channels: Tensor) -> tuple[Tensor, ...]:
        shared = self.space.groups * self.space.state
        return channels.split([self.space.width, shared, shared], dim=1)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.steps.device)

    def states(self, grad: Tensor | None = None) -> Tensor:
        """The states that enter chunks, or the gradients of those that leave chunks.

        Returns:
            ``[chunks, M, P, N]``; nothing is written where a chunk's edge is a document's.
        """
        x, b, c = self.inputs
        space, sizes = self.space, self.sizes
        rows, lanes = (x, b) if grad is None else (grad, c)
        shape = self.chunks, space.heads, space.head_size, space.state
        states = torch.empty(shape, dtype=x.dtype, device=x.device)
        options = _fitted(_WALK, space)
        tiles = (space.head_size // options["ROWS"]) * (space.state // options["LANES"])
        _walk[(len(self.starts) - 1, space.heads, tiles)](
            rows, lanes, self.steps, self.sums, self.starts, states, rows.stride(0), lanes.stride(0),
            space.heads, space.groups, REVERSE=grad is not None, **sizes, **options,
        )  # fmt: skip
        return states

    def add_up(self, x: Tensor, c: Tensor, states: Tensor, y: Tensor, *, reverse: bool) -> None:
        """y from x, C and the states that enter; or dx from dy, B and the gradients of those that leave."""
        space = self.space
        _outputs[(space.heads, self.chunks)](
            x, c, self.steps, self.sums, space.skip, self.inner, states, self.positions, y, x.stride(0),
            c.stride(0), y.stride(0), len(x), space.heads, space.groups, REVERSE=reverse, **self.sizes,
            **_fitted(_OUTPUTS, space),
        )  # fmt: skip


def _fitted(options: dict[str, Any], space: StateSpace) -> dict[str, Any]:
    """`options` with tiles no larger than the states."""
    sizes = {"ROWS": space.head_size, "LANES": space.state}
    return {name: min(value, sizes.get(name, value)) for name, value in options.items()}


def _lanes_of_heads(space: StateSpace) -> int:
    return max(triton.next_power_of_2(space.heads), 16)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), also where that is far below 1."""
    e = tl.exp(-tl.abs(x))
    # log(1 + e) = 2 artanh(e / (2 + e)), at most 2 artanh(1 / 3)
    s = e / (2.0 + e)
    t = s * s
    series = 1.0 / 13.0
    series = series * t + 1.0 / 11.0
    series = series * t + 1.0 / 9.0
    series = series * t + 1.0 / 7.0
    series = series * t + 1.0 / 5.0
    series = series * t + 1.0 / 3.0
    return tl.maximum(x, 0.0) + 2.0 * s * (series * t + 1.0)


@triton.jit
def _decays(later, earlier, seen):
    """exp(later - earlier), 0 where not `seen`: between documents the difference may be large."""
    return tl.exp(tl.where(seen, later - earlier, float("-inf")))


@triton.jit
def _documents(positions_ptr, chunk, tokens, CHUNK: tl.constexpr):
    """Where a chunk's tokens' documents begin, ``[CHUNK]``; where the one begins that goes on behind it.

    The latter is the next chunk's first token if none goes on.
    """
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    began = token - tl.load(positions_ptr + token, mask=token < tokens, other=0)
    behind = (chunk + 1) * CHUNK
    return began, behind - tl.load(positions_ptr + behind, mask=behind < tokens, other=0)


@triton.jit(do_not_specialize=["tokens"])  # it differs from one micro-batch to the next
def _sum_decays(
    raw_ptr,  # [T, M], rows raw_stride apart
    multipliers_ptr,  # float32 [M]
    step_bias_ptr,  # [M]
    rate_ptr,  # float32 [M]
    positions_ptr,  # int64 [T]
    steps_ptr,  # float32 [chunks, M, Q]
    sums_ptr,  # float32 [chunks, M, Q]
    raw_stride,
    tokens,  # T
    heads,  # M
    least,
    most,
    CHUNK: tl.constexpr,  # Q
    HEADS: tl.constexpr,  # M, up to a power of two
):
    chunk = tl.program_id(0).to(tl.int64)
    place, head = tl.arange(0, CHUNK), tl.arange(0, HEADS)[None, :]
    token, own = (chunk * CHUNK + place)[:, None], head < heads
    mask = (token < tokens) & own
    raw = read(raw_ptr, token * raw_stride + head, mask) * read(multipliers_ptr, head, own)
    step = tl.minimum(tl.maximum(_softplus(raw + read(step_bias_ptr, head, own)), least), most)
    step = tl.where(mask, step, 0.0)
    began, _ = _documents(positions_ptr, chunk, tokens, CHUNK)
    # Within documents: no other one's decays move a sum by a bit.
    earlier = (place[:, None] >= place[None, :]) & (began[:, None] == began[None, :])
    sums = tl.dot(earlier.to(tl.float32), step * read(rate_ptr, head, own), input_precision="ieee")
    at = (chunk * heads + head) * CHUNK + place[:, None]
    tl.store(steps_ptr + at, step, mask=own)
    tl.store(sums_ptr + at, sums, mask=own)


@triton.jit(do_not_specialize=["tokens"])
def _match(
    b_ptr,  # [T, G N], rows stride apart
    c_ptr,  # [T, G N], rows stride apart
    inner_ptr,  # float32 [chunks, G, Q, Q]
    stride,
    tokens,  # T
    CHUNK: tl.constexpr,  # Q
    STATE: tl.constexpr,  # N
    LANES: tl.constexpr,
):
    group, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place, lane = tl.arange(0, CHUNK), tl.arange(0, LANES)
    token = chunk * CHUNK + place
    at = token[:, None] * stride + group * STATE + lane[None, :]
    mask = (token < tokens)[:, None]
    inner = tl.zeros([CHUNK, CHUNK], tl.float32)
    for n in range(0, STATE, LANES):
        b = tl.load(b_ptr + at + n, mask=mask, other=0.0)
        c = tl.load(c_ptr + at + n, mask=mask, other=0.0)
        inner = tl.dot(c, tl.trans(b), inner, input_precision="ieee")
    inner_ptr += (chunk * tl.num_programs(0) + group) * CHUNK * CHUNK
    tl.store(inner_ptr + place[:, None] * CHUNK + place[None, :], inner)


@triton.jit
def _walk(
    rows_ptr,  # [T, M P], x; where REVERSE the gradient of y; rows rows_stride apart
    lanes_ptr,  # [T, G N], B; where REVERSE C; rows lanes_stride apart
    steps_ptr,  # float32 [chunks, M, Q]
    sums_ptr,  # float32 [chunks, M, Q]
    starts_ptr,  # int32 [documents + 1]
    states_ptr,  # [chunks, M, P, N]
    rows_stride,
    lanes_stride,
    heads,  # M
    groups,  # G
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,  # Q
    WIDTH: tl.constexpr,  # P
    STATE: tl.constexpr,  # N
    ROWS: tl.constexpr,  # of P
    LANES: tl.constexpr,  # of N
):
    head = tl.program_id(1)
    row = (tl.program_id(2) % (WIDTH // ROWS)) * ROWS + tl.arange(0, ROWS)
    lane = (tl.program_id(2) // (WIDTH // ROWS)) * LANES + tl.arange(0, LANES)
    place = tl.arange(0, CHUNK)
    start, end = tl.load(starts_ptr + tl.program_id(0)), tl.load(starts_ptr + tl.program_id(0) + 1)
    first, last = start // CHUNK, (end - 1) // CHUNK
    rows_ptr += head * WIDTH + row[:, None]
    lanes_ptr += (head // (heads // groups)) * STATE + lane[None, :]
    state = tl.zeros([ROWS, LANES], tl.float32)
    for step in range(last - first):
        chunk = (last - step if REVERSE else first + step).to(tl.int64)
        token = chunk * CHUNK + place
        own = (token >= start) & (token < end)
        at = (chunk * heads + head) * CHUNK
        sums, total = tl.load(sums_ptr + at + place), tl.load(sums_ptr + at + CHUNK - 1)
        if REVERSE:
            share = _decays(sums, 0.0, own)
        else:
            share = tl.load(steps_ptr + at + place) * _decays(total, sums, own)
        x = tl.load(rows_ptr + token[None, :] * rows_stride, mask=own[None, :], other=0.0)  # [ROWS, Q]
        b = tl.load(lanes_ptr + token[:, None] * lanes_stride, mask=own[:, None], other=0.0)  # [Q, LANES]
        x = (x * share[None, :]).to(b.dtype)
        state = tl.dot(x, b, state * tl.exp(total), input_precision="ieee")
        into = chunk - 1 if REVERSE else chunk + 1
        out = states_ptr + ((into * heads + head) * WIDTH + row[:, None]) * STATE + lane[None, :]
        tl.store(out, state.to(states_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens"])
def _outputs(
    x_ptr,  # [T, M P], rows x_stride apart; where REVERSE the gradient of y
    c_ptr,  # [T, G N], rows c_stride apart; where REVERSE B
    steps_ptr,  # float32 [chunks, M, Q]
    sums_ptr,  # float32 [chunks, M, Q]
    skip_ptr,  # [M]
    inner_ptr,  # float32 [chunks, G, Q, Q]
    states_ptr,  # [chunks, M, P, N], that enter; where REVERSE the gradients of those that leave
    positions_ptr,  # int64 [T]
    y_ptr,  # [T, M P], rows y_stride apart; where REVERSE the gradient of x
    x_stride,
    c_stride,
    y_stride,
    tokens,  # T
    heads,  # M
    groups,  # G
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,  # Q
    WIDTH: tl.constexpr,  # P
    STATE: tl.constexpr,  # N
    LANES: tl.constexpr,  # of N
):
    head, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group = head // (heads // groups)
    place, column, lane = tl.arange(0, CHUNK), tl.arange(0, WIDTH), tl.arange(0, LANES)
    row, other = place[:, None], place[None, :]
    first = chunk * CHUNK
    token = first + place
    mask = (token < tokens)[:, None]
    began, leaving = _documents(positions_ptr, chunk, tokens, CHUNK)
    seen = began[:, None] == began[None, :]
    at = (chunk * heads + head) * CHUNK
    step, sums = tl.load(steps_ptr + at + place), tl.load(sums_ptr + at + place)
    at_inner = inner_ptr + (chunk * groups + group) * CHUNK * CHUNK
    # What is left of a state at each token; and what each token [row] takes of the others.
    if REVERSE:
        crosses = leaving < first + CHUNK
        left = _decays(tl.load(sums_ptr + at + CHUNK - 1), sums, token >= leaving)
        share = tl.load(at_inner + other * CHUNK + row)
        share *= _decays(sums[None, :], sums[:, None], seen & (row <= other))
    else:
        crosses = tl.load(positions_ptr + first) > 0
        left = _decays(sums, 0.0, began < first)
        share = tl.load(at_inner + row * CHUNK + other)
        share *= _decays(sums[:, None], sums[None, :], seen & (row >= other)) * step[None, :]
    y = tl.zeros([CHUNK, WIDTH], tl.float32)
    at_state = (chunk * heads + head) * WIDTH * STATE + column[None, :] * STATE + lane[:, None]  # [LANES, P]
    at_c = token[:, None] * c_stride + group * STATE + lane[None, :]
    for n in range(0, STATE, LANES):
        c = tl.load(c_ptr + at_c + n, mask=mask, other=0.0)
        state = tl.load(states_ptr + at_state + n, mask=crosses & (at_state >= 0), other=0.0)
        y = tl.dot(c, state, y, input_precision="ieee")
    at_x = head * WIDTH + column[None, :]
    x = tl.load(x_ptr + token[:, None] * x_stride + at_x, mask=mask, other=0.0)
    y = tl.dot(share.to(x.dtype), x, y * left[:, None], input_precision="ieee")
    if REVERSE:
        y *= step[:, None]
    y += read(skip_ptr, head, True) * x
    tl.store(y_ptr + token[:, None] * y_stride + at_x, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _of_scores(
    grad_ptr,  # [T, M P], of y
    x_ptr,  # [T, M P], rows stride apart
    steps_ptr,  # float32 [chunks, M, Q]
    sums_ptr,  # float32 [chunks, M, Q]
    inner_ptr,  # float32 [chunks, G, Q, Q]
    positions_ptr,  # int64 [T]
    of_inner_ptr,  # float32 [blocks, chunks, G, Q, Q]
    direct_ptr,  # float32 [chunks, M, Q], column sums of S without Δ
    within_ptr,  # float32 [chunks, M, Q], row sums minus column sums of S
    stride,
    tokens,  # T
    heads,  # M
    groups,  # G
    HEADS: tl.constexpr,  # of a group, at most, a program's
    CHUNK: tl.constexpr,  # Q
    WIDTH: tl.constexpr,  # P
):
    shared = heads // groups
    group, chunk = tl.program_id(0) % groups, tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) // groups
    place, column = tl.arange(0, CHUNK), tl.arange(0, WIDTH)
    row, other = place[:, None], place[None, :]
    token = chunk * CHUNK + place
    mask = (token < tokens)[:, None]
    began, _ = _documents(positions_ptr, chunk, tokens, CHUNK)
    seen = (began[:, None] == began[None, :]) & (row >= other)
    inner_ptr += (chunk * groups + group) * CHUNK * CHUNK
    inner = tl.load(inner_ptr + row * CHUNK + other)
    of_inner = tl.zeros([CHUNK, CHUNK], tl.float32)
    for head in range(group * shared + block * HEADS, group * shared + min((block + 1) * HEADS, shared)):
        at = (chunk * heads + head) * CHUNK + place
        step, sums = tl.load(steps_ptr + at), tl.load(sums_ptr + at)
        at_row = head * WIDTH + column[None, :]
        grad = tl.load(grad_ptr + token[:, None] * (heads * WIDTH) + at_row, mask=mask, other=0.0)
        x = tl.load(x_ptr + token[:, None] * stride + at_row, mask=mask, other=0.0)
        scores = tl.dot(grad, tl.trans(x), input_precision="ieee")
        scores *= _decays(sums[:, None], sums[None, :], seen)
        of_inner += scores * step[None, :]
        scores *= inner
        tl.store(direct_ptr + at, tl.sum(scores, 0))
        # A token's own term is in its row and in its column.
        scores = tl.where(row > other, scores * step[None, :], 0.0)
        tl.store(within_ptr + at, tl.sum(scores, 1) - tl.sum(scores, 0))
    of_inner_ptr += ((block * tl.num_programs(1) + chunk) * groups + group) * CHUNK * CHUNK
    tl.store(of_inner_ptr + row * CHUNK + other, of_inner)


@triton.jit(do_not_specialize=["tokens"])
def _of_shared(
    grad_ptr,  # [T, M P], of y
    x_ptr,  # [T, M P], rows stride apart
    b_ptr,  # [T, G N], rows stride apart
    c_ptr,  # [T, G N], rows stride apart
    steps_ptr,  # float32 [chunks, M, Q]
    sums_ptr,  # float32 [chunks, M, Q]
    of_inner_ptr,  # float32 [BLOCKS, chunks, G, Q, Q]
    states_ptr,  # [chunks, M, P, N], that enter
    gradients_ptr,  # [chunks, M, P, N], of the states that leave
    positions_ptr,  # int64 [T]
    db_ptr,  # [T, G N], rows out_stride apart
    dc_ptr,  # [T, G N], rows out_stride apart
    entered_ptr,  # float32 [N / LANES, chunks, M, Q], column of what entered, in these lanes
    leaving_ptr,  # float32 [N / LANES, chunks, M, Q], row of what leaves, without Δ
    past_ptr,  # float32 [N / LANES, chunks, M], of what entered and leaves
    stride,
    out_stride,
    tokens,  # T
    heads,  # M
    groups,  # G
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,  # Q
    WIDTH: tl.constexpr,  # P
    STATE: tl.constexpr,  # N
    LANES: tl.constexpr,  # of N
):
    shared, chunks = heads // groups, tl.num_programs(1)
    group, chunk = tl.program_id(0) % groups, tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) // groups
    place, column = tl.arange(0, CHUNK), tl.arange(0, WIDTH)
    lane = block * LANES + tl.arange(0, LANES)
    first = chunk * CHUNK
    token = first + place
    mask = (token < tokens)[:, None]
    began, leaving = _documents(positions_ptr, chunk, tokens, CHUNK)
    enters, leaves = tl.load(positions_ptr + first) > 0, leaving < first + CHUNK
    at_b = token[:, None] * stride + group * STATE + lane[None, :]
    b = tl.load(b_ptr + at_b, mask=mask, other=0.0)
    c = tl.load(c_ptr + at_b, mask=mask, other=0.0)
    db = tl.zeros([CHUNK, LANES], tl.float32)
    dc = tl.zeros([CHUNK, LANES], tl.float32)
    at_state = column[:, None] * STATE + lane[None, :]
    for head in range(group * shared, (group + 1) * shared):
        at = (chunk * heads + head) * CHUNK
        step, sums = tl.load(steps_ptr + at + place), tl.load(sums_ptr + at + place)
        total = tl.load(sums_ptr + at + CHUNK - 1)
        at_row = head * WIDTH + column[None, :]
        grad = tl.load(grad_ptr + token[:, None] * (heads * WIDTH) + at_row, mask=mask, other=0.0)
        x = tl.load(x_ptr + token[:, None] * stride + at_row, mask=mask, other=0.0)
        of_head = (chunk * heads + head) * WIDTH * STATE
        state = tl.load(states_ptr + of_head + at_state, mask=enters & (at_state >= 0), other=0.0)
        of_state = tl.load(gradients_ptr + of_head + at_state, mask=leaves & (at_state >= 0), other=0.0)
        entered = tl.dot(grad, state, input_precision="ieee")
        entered *= _decays(sums, 0.0, began < first)[:, None]
        dc += entered
        left = tl.dot(x, of_state, input_precision="ieee")
        left *= _decays(total, sums, token >= leaving)[:, None]
        db += step[:, None] * left
        past = tl.sum(state.to(tl.float32) * of_state.to(tl.float32))
        at_partial = (block * chunks + chunk) * heads + head
        tl.store(entered_ptr + at_partial * CHUNK + place, tl.sum(entered * c, 1))
        tl.store(leaving_ptr + at_partial * CHUNK + place, tl.sum(left * b, 1))
        tl.store(past_ptr + at_partial, tl.where(leaving < first, past * tl.exp(total), 0.0))
    row, other = place[:, None], place[None, :]
    of_inner = tl.zeros([CHUNK, CHUNK], tl.float32)
    of_inner_back = tl.zeros([CHUNK, CHUNK], tl.float32)
    for part in range(BLOCKS):
        at_inner = of_inner_ptr + ((part * chunks + chunk) * groups + group) * CHUNK * CHUNK
        of_inner += tl.load(at_inner + row * CHUNK + other)
        of_inner_back += tl.load(at_inner + other * CHUNK + row)
    dc = tl.dot(of_inner.to(b.dtype), b, dc, input_precision="ieee")
    db = tl.dot(of_inner_back.to(c.dtype), c, db, input_precision="ieee")
    at_out = token[:, None] * out_stride + group * STATE + lane[None, :]
    tl.store(db_ptr + at_out, db.to(db_ptr.dtype.element_ty), mask=mask)
    tl.store(dc_ptr + at_out, dc.to(dc_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _of_steps(
    raw_ptr,  # [T, M], rows raw_stride apart
    multipliers_ptr,  # float32 [M]
    step_bias_ptr,  # [M]
    rate_ptr,  # float32 [M]
    steps_ptr,  # float32 [chunks, M, Q]
    direct_ptr,  # float32 [chunks, M, Q]
    within_ptr,  # float32 [chunks, M, Q]
    entered_ptr,  # float32 [BLOCKS, chunks, M, Q]
    leaving_ptr,  # float32 [BLOCKS, chunks, M, Q]
    past_ptr,  # float32 [BLOCKS, chunks, M]
    positions_ptr,  # int64 [T]
    of_raw_ptr,  # [T, M], rows of_raw_stride apart
    raw_stride,
    of_raw_stride,
    tokens,  # T
    heads,  # M
    least,
    most,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,  # Q
    HEADS: tl.constexpr,  # M, up to a power of two
):
    chunk = tl.program_id(0).to(tl.int64)
    place, head = tl.arange(0, CHUNK), tl.arange(0, HEADS)[None, :]
    token = (chunk * CHUNK + place)[:, None]
    own = head < heads
    mask = (token < tokens) & own
    began, leaving = _documents(positions_ptr, chunk, tokens, CHUNK)
    at = (chunk * heads + head) * CHUNK + place[:, None]
    along, direct = read(within_ptr, at, own), read(direct_ptr, at, own)
    left, past = tl.zeros([CHUNK, HEADS], tl.float32), tl.zeros([1, HEADS], tl.float32)
    for block in range(BLOCKS):
        part = block * tl.num_programs(0).to(tl.int64) * heads
        along += read(entered_ptr, part * CHUNK + at, own)
        left += read(leaving_ptr, part * CHUNK + at, own)
        past += read(past_ptr, part + chunk * heads + head, own)
    direct += left
    left *= read(steps_ptr, at, own)
    past += tl.sum(left, 0)[None, :]
    later = (place[:, None] <= place[None, :]) & (began[:, None] == began[None, :])
    of_decay = tl.dot(later.to(tl.float32), along - left, input_precision="ieee")
    of_decay += tl.where(token >= leaving, past, 0.0)
    gradient = direct + read(rate_ptr, head, own) * of_decay
    multiplier = read(multipliers_ptr, head, own)
    raw = read(raw_ptr, token * raw_stride + head, mask) * multiplier + read(step_bias_ptr, head, own)
    step = _softplus(raw)
    gradient = tl.where((step >= least) & (step <= most), gradient * tl.sigmoid(raw) * multiplier, 0.0)
    at_out = token * of_raw_stride + head
    tl.store(of_raw_ptr + at_out, gradient.to(of_raw_ptr.dtype.element_ty), mask=mask)
