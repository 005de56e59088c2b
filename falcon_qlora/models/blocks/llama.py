"""Falcon3's fast block: its modules as `kernels.sublayer` takes them, and its ``forward``.

Attention is one sublayer and the feed-forward layer the next. Blocks here are Transformers'
``LlamaDecoderLayer``, inside which PEFT has put its layers.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.kernels.frozen_linear import Adapter, Projection, project
from falcon_qlora.kernels.mixers import RotatedAttention, SwiGlu
from falcon_qlora.kernels.sublayer import Fp8Sublayers, RmsNorm, Sublayer, Sublayers, run_sublayers
from falcon_qlora.kernels.workspace import Workspace
from falcon_qlora.models.blocks.attention import PackedAttention, PrefixedAttention
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
from falcon_qlora.models.layouts.llama import Llama
from falcon_qlora.models.packed_attention import Sequences
from falcon_qlora.models.prefix import prefix_of
from falcon_qlora.models.scaled import scale_and_bias_of


def block_facts(block: Any, dtype: torch.dtype) -> BlockFacts:
    """The facts about a block that `fast_path.decide` needs; `dtype` is that of the activations."""
    linears = _linears_of(block)
    return facts_of(
        block,
        linears,
        block.self_attn,
        block.self_attn.config.num_key_value_heads,
        dtype,
        unlike=Llama(block.self_attn.config).unlike_fast_block(),
        lora_unknown=_more_than_lora(block),
        activation="SwiGLU",
    )


def _more_than_lora(block: Any) -> str | None:
    """A mix of adapters that the fast block does not compute, trainable or not; None if there is none."""
    linears = _linears_of(block)
    if any(scale_and_bias_of(base_of(linear)) is not None for linear in linears):
        return "scales and biases on the linears (Adapter v2)"
    if prefix_of(block.self_attn) is not None and any(base_of(linear) is not linear for linear in linears):
        return "LoRA where attention looks at a learned prefix (Adapter)"
    return None


def _linears_of(block: Any) -> list[Any]:
    """In the order of ``Sublayers.projections``."""
    attention, mlp = block.self_attn, block.mlp
    of_attention = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*of_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def block_and_adapters(module: Any, state: State) -> tuple[Sublayers, list[Adapter]] | None:
    """What `kernels.sublayer` needs, from the modules' current state; None where it cannot compute that."""
    if _more_than_lora(module) is not None:
        return None
    try:
        pairs = [projection_of(linear, state) for linear in _linears_of(module)]
    except UnknownAdapter:
        return None
    q, k, v, o, gate, up, down = (projection for projection, _ in pairs)
    first, second = (
        RmsNorm(norm.weight, norm.variance_epsilon)
        for norm in (module.input_layernorm, module.post_attention_layernorm)
    )
    parts = Sublayer(first, (q, k, v), (o,)), Sublayer(second, (gate, up), (down,))
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
) -> Tensor:
    """The block's ``forward``: fast where the call has packed documents, else as before."""
    state = state_of(self)
    assert state is not None
    parts = block_and_adapters(self, state) if isinstance(attention_mask, Sequences) else None
    if parts is None:
        kwargs["position_embeddings"] = position_embeddings
        output: Tensor = forward_before(self)(hidden_states, attention_mask, *args, **kwargs)
        return output
    assert isinstance(attention_mask, Sequences)
    assert position_embeddings is not None
    block, adapters = parts
    # Not ``[0]``: its gradient would be written into zeros, row by row.
    hidden, (cosine, sine) = hidden_states.squeeze(0), (each[0] for each in position_embeddings)
    attention = _attention(self, block, PackedAttention(attention_mask, state.attention), hidden.dtype)
    kv_heads = block.parts[0].into[1].out_features // self.self_attn.head_dim
    mixers = RotatedAttention(attention, cosine, sine, kv_heads), SwiGlu(in_fp8=block.fp8 is not None)
    with state.offload.moving(hidden) if state.keep == "offload" else nullcontext():
        return run_sublayers(hidden, block, mixers, adapters).unsqueeze(0)


def _attention(
    module: Any, block: Sublayers, attention: PackedAttention, dtype: torch.dtype
) -> PackedAttention:
    """`attention`, with the block's prefix if it has an enabled one."""
    prefix = prefix_of(module.self_attn)
    if prefix is None or not prefix.enabled:
        return attention
    # Not through the modules: in 8 bits they would round their input, and wait for the GPU.
    rows = prefix.prefix.to(dtype)
    _, *projections = block.parts[0].into
    key, value = (_heads(rows, each, block.workspace, module.self_attn.head_dim) for each in projections)
    return PrefixedAttention(attention.sequences, attention.kernel, key, value, prefix.gate)


def _heads(rows: Tensor, projection: Projection, workspace: Workspace, head_dim: int) -> Tensor:
    """``[P, H]`` → ``[P, G, D]``."""
    return project(rows, projection, workspace).unflatten(1, (-1, head_dim))
