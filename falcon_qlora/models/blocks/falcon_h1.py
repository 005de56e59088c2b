"""Falcon-H1's fast block: its modules as `kernels.sublayer` takes them, and its ``forward``.

Attention and the state space, which share their input and are added up, are one sublayer, and the
feed-forward layer is the next. Blocks here are Transformers' ``FalconH1DecoderLayer``, inside which PEFT has
put its layers.

No multiplier costs a pass or is rounded. A linear of s x is s times the linear of x, and so it is with LoRA.
So those of queries and keys go into the scale of scores, and the others into what reads or writes a linear's
columns, in float32.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.kernels.frozen_linear import Adapter
from falcon_qlora.kernels.mixers import AttentionBesideStateSpace, RotatedAttention, SwiGlu
from falcon_qlora.kernels.sublayer import Fp8Sublayers, Mixer, RmsNorm, Sublayer, Sublayers, run_sublayers
from falcon_qlora.models.blocks.attention import PackedAttention
from falcon_qlora.models.blocks.fast_block import (
    BlockFacts,
    State,
    UnknownAdapter,
    base_of,
    facts_of,
    kept_by,
    projection_of,
    state_of,
)
from falcon_qlora.models.forward import forward_before
from falcon_qlora.models.layouts.falcon_h1 import FalconH1, state_space
from falcon_qlora.models.packed_attention import Sequences


def block_facts(block: Any, dtype: torch.dtype) -> BlockFacts:
    """The facts about a block that `fast_path.decide` needs; `dtype` is that of the activations."""
    return facts_of(
        block,
        _linears_of(block),
        block.self_attn,
        block.self_attn.config.num_key_value_heads,
        dtype,
        unlike=FalconH1(block.self_attn.config).unlike_fast_block(),
        lora_unknown=None,
        activation="SwiGLU",
        state_space=(block.mamba.head_dim, block.mamba.ssm_state_size),
    )


def _linears_of(block: Any) -> list[Any]:
    """In the order of ``Sublayers.projections``."""
    attention, mamba, mlp = block.self_attn, block.mamba, block.feed_forward
    into = [attention.q_proj, attention.k_proj, attention.v_proj, mamba.in_proj]
    return [*into, attention.o_proj, mamba.out_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def block_and_adapters(module: Any, state: State) -> tuple[Sublayers, list[Adapter]] | None:
    """What `kernels.sublayer` needs, from the modules' current state; None where it cannot compute that."""
    try:
        pairs = [projection_of(linear, state) for linear in _linears_of(module)]
    except UnknownAdapter:
        return None
    q, k, v, into, o, out_of, gate, up, down = (projection for projection, _ in pairs)
    first, second = (
        RmsNorm(norm.weight, norm.variance_epsilon)
        for norm in (module.input_layernorm, module.pre_ff_layernorm)
    )
    parts = Sublayer(first, (q, k, v, into), (o, out_of)), Sublayer(second, (gate, up), (down,))
    in_fp8 = state.products if isinstance(state.products, Fp8Sublayers) else None
    block = Sublayers(parts, state.workspace, kept_by(module, state), in_fp8)
    return block, [adapter for _, adapter in pairs]


def block_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Sequences | Tensor | None = None,
    *args: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor]:
    """The block's ``forward``: fast where the call has packed documents, else as before."""
    state = state_of(self)
    assert state is not None
    parts = block_and_adapters(self, state) if isinstance(attention_mask, Sequences) else None
    if parts is None:
        kwargs["position_embeddings"] = position_embeddings
        before: tuple[Tensor] = forward_before(self)(hidden_states, attention_mask, *args, **kwargs)
        return before
    assert isinstance(attention_mask, Sequences)
    assert position_embeddings is not None
    # Not ``[0]``: its gradient would be written into zeros, row by row.
    hidden, (cosine, sine) = hidden_states.squeeze(0), (each[0] for each in position_embeddings)
    attention = PackedAttention(
        attention_mask, state.attention, multiplier=FalconH1(self.self_attn.config).score_factor
    )
    mixers = _mixers(self, attention, cosine, sine, in_fp8=parts[0].fp8 is not None)
    with state.offload.moving(hidden) if state.keep == "offload" else nullcontext():
        return (run_sublayers(hidden, parts[0], mixers, parts[1]).unsqueeze(0),)


def _mixers(
    block: Any, attention: PackedAttention, cosine: Tensor, sine: Tensor, *, in_fp8: bool
) -> tuple[Mixer, Mixer]:
    module, mamba, mlp = block.self_attn, block.mamba, block.feed_forward
    kv_heads = base_of(module.k_proj).out_features // module.head_dim
    scale = block.attention_in_multiplier * block.attn_out_multiplier  # the former of values
    heads = RotatedAttention(attention, cosine, sine, kv_heads, scale)
    space = state_space(mamba)
    space = dataclasses.replace(space, multipliers=space.multipliers * mamba.ssm_in_multiplier)
    sequences = attention.sequences
    documents = sequences.position_ids[0], sequences.cu_seqlens
    beside = AttentionBesideStateSpace(heads, space, *documents, block.ssm_out_multiplier)
    return beside, SwiGlu(mlp.gate_multiplier, mlp.down_multiplier, in_fp8)
