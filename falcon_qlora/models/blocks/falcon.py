"""Falcon's fast block: its modules as `kernels.block` takes them, and its ``forward``.

`kernels.block` computes the parallel block with rotary positions and no biases: all layouts but rw-1b's.
Blocks here are Transformers' ``FalconDecoderLayer``, inside which PEFT has put its layers.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from falcon_qlora.kernels.block import Block, Norm, run_block
from falcon_qlora.kernels.frozen_linear import Adapter, project
from falcon_qlora.kernels.scaled_products import ScaledProducts
from falcon_qlora.kernels.sublayer import Fp8Sublayers
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
from falcon_qlora.models.layouts.falcon import Falcon, split_heads
from falcon_qlora.models.packed_attention import Sequences
from falcon_qlora.models.prefix import prefix_of
from falcon_qlora.models.scaled import scale_and_bias_of


def block_facts(block: Any, dtype: torch.dtype) -> BlockFacts:
    """The facts about a block that `fast_path.decide` needs; `dtype` is that of the activations."""
    linears = _linears_of(block)
    vectors = [scale_and_bias_of(base_of(linear)) for linear in linears]
    scaled = all(each is not None for each in vectors)
    known: list[nn.Parameter] = []
    if scaled:
        norms = [module for module in block.modules() if isinstance(module, nn.LayerNorm)]
        known = [p for module in [*vectors, *norms] if module is not None for p in module.parameters()]
    return facts_of(
        block,
        linears,
        block.self_attention,
        block.self_attention.num_kv_heads,
        dtype,
        unlike=Falcon(block.config).unlike_fast_block(),
        lora_unknown=_more_than_lora(block),
        known=known,
        scaled=scaled,
        leaves_rows_out=not scaled,
    )


def _more_than_lora(block: Any) -> str | None:
    """A mix of adapters that the fast block does not compute, trainable or not; None if there is none."""
    linears = _linears_of(block)
    vectors = [scale_and_bias_of(base_of(linear)) is not None for linear in linears]
    if any(vectors) and not all(vectors):
        return "scales and biases on some of the linears"
    if any(base_of(linear) is not linear for linear in linears):
        if any(vectors):
            return "LoRA beside scales and biases on the linears (Adapter v2)"
        if prefix_of(block.self_attention) is not None:
            return "LoRA where attention looks at a learned prefix (Adapter)"
    return None


def _linears_of(block: Any) -> list[Any]:
    """In the order of ``Block.projections``."""
    attention, mlp = block.self_attention, block.mlp
    return [attention.query_key_value, mlp.dense_h_to_4h, mlp.dense_4h_to_h, attention.dense]


def _norms(block: Any) -> tuple[Norm, ...]:
    config = block.config
    two = config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2
    modules = (block.ln_attn, block.ln_mlp) if two else (block.input_layernorm,)
    return tuple(Norm(module.weight, module.bias, module.eps) for module in modules)


def block_and_adapters(module: Any, state: State) -> tuple[Block, list[Adapter]] | None:
    """What `kernels.block` needs, from the modules' current state; None where it cannot compute that."""
    prefix, scaled = prefix_of(module.self_attention), state.products is ScaledProducts
    projections, adapters = [], []
    for linear in _linears_of(module):
        try:
            projection, adapter = projection_of(linear, state)
        except UnknownAdapter:
            return None
        vectors = scale_and_bias_of(projection.layer)
        if (vectors is not None) != scaled or (projection.rank and prefix is not None):
            return None
        if vectors is not None:
            if projection.rank or not vectors.enabled:
                return None
            adapter = (vectors.scale, vectors.bias)
        projections.append(projection)
        adapters.append(adapter)
    assert not isinstance(state.products, Fp8Sublayers)
    norms = _norms(module)
    if scaled:
        adapters += [(norm.weight, norm.bias) for norm in norms]
    query_key_value, dense_h_to_4h, dense_4h_to_h, dense = projections
    block = Block(
        norms=norms,
        query_key_value=query_key_value,
        dense_h_to_4h=dense_h_to_4h,
        dense_4h_to_h=dense_4h_to_h,
        dense=dense,
        kv_heads=module.self_attention.num_kv_heads,
        head_dim=module.self_attention.head_dim,
        workspace=state.workspace,
        products=state.products,
        keep=kept_by(module, state),
    )
    return block, adapters


def block_forward(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None = None,
    attention_mask: Sequences | Tensor | None = None,
    *args: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The block's ``forward``: fast where the call has packed documents, else as before."""
    state = state_of(self)
    assert state is not None
    parts = block_and_adapters(self, state) if isinstance(attention_mask, Sequences) else None
    if parts is None:
        kwargs["position_embeddings"] = position_embeddings
        return forward_before(self)(hidden_states, alibi, attention_mask, *args, **kwargs)
    assert isinstance(attention_mask, Sequences)
    assert position_embeddings is not None
    # Not ``[0]``: its gradient would be written into zeros, row by row.
    hidden, (cosine, sine) = hidden_states.squeeze(0), (each[0] for each in position_embeddings)
    block, adapters = parts
    if state.products is not ScaledProducts:
        block = replace(block, rows=attention_mask.wanted)
    attention = _attention(self, block, PackedAttention(attention_mask, state.attention), hidden.dtype)
    with state.offload.moving(hidden) if state.keep == "offload" else nullcontext():
        output = run_block(hidden, cosine, sine, block, attention, adapters)
    return output.unsqueeze(0), None


def _attention(module: Any, block: Block, attention: PackedAttention, dtype: torch.dtype) -> PackedAttention:
    """`attention`, with the block's prefix if it has an enabled one."""
    prefix = prefix_of(module.self_attention)
    if prefix is None or not prefix.enabled:
        return attention
    # Not through the module: in 8 bits it would round its input, and wait for the GPU.
    fused = project(prefix.prefix.to(dtype), block.query_key_value, block.workspace)
    vectors = scale_and_bias_of(module.self_attention.query_key_value)
    if vectors is not None:
        fused = vectors(fused)
    _, key, value = split_heads(fused, module.self_attention)
    return PrefixedAttention(attention.sequences, attention.kernel, key, value, prefix.gate)
