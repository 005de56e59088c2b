"""The fast path: a loaded model's blocks run as single autograd functions over packed documents.

`apply_fast_path` gives single blocks another ``forward``, reversibly; nothing is changed at import. A block
whose layout or adapter the fast path does not know keeps its own, and so does a call without packed
documents. PEFT's modules stay where they are: their matrices are read at every call, and get the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import FalconForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer

from falcon_qlora.common.errors import UserError
from falcon_qlora.kernels import fp8, ops
from falcon_qlora.kernels.block import Block, Norm, Products, run_block
from falcon_qlora.kernels.dequantized import DequantizedProducts
from falcon_qlora.kernels.fp8_block import Fp8
from falcon_qlora.kernels.frozen_linear import Adapter, Projection, Workspace, project
from falcon_qlora.kernels.gelu_products import GeluProducts, gelu_products
from falcon_qlora.kernels.low_rank import Dropout
from falcon_qlora.kernels.offload import Offload
from falcon_qlora.kernels.scaled_products import ScaledProducts
from falcon_qlora.models.fast_attention import (
    AttentionKernel,
    PackedAttention,
    PrefixedAttention,
    choose_attention,
)
from falcon_qlora.models.fast_facts import (
    UnknownAdapter,
    active_adapter,
    base_of,
    block_facts,
    decide,
    dropout_of,
    linears_of,
)
from falcon_qlora.models.forward import enable_packing, pack_batches
from falcon_qlora.models.packed_attention import Sequences, split_heads
from falcon_qlora.models.prefix import prefix_of
from falcon_qlora.models.scaled import scale_and_bias_of

_BEFORE = "_forward_before_fast_path"
_STATE = "_fast_path_state"
# Older releases of Transformers recompute in ``__call__``, which comes before our forward anyway.
_RECOMPUTES_IN_CALL = "__call__" in vars(GradientCheckpointingLayer)

Keep = Literal["all", "attention", "input", "offload"]
"""What a block keeps for its backward pass, see `Block.keep`; ``offload``: its input, in CPU memory."""


MakeProducts = Callable[[Block, Sequence[Adapter]], Products]


@dataclass
class _State:
    """A fast block's own: what it keeps and runs on, and what it shares with the model's others."""

    keep: Keep
    workspace: Workspace
    offload: Offload
    attention: AttentionKernel
    products: MakeProducts = DequantizedProducts


def apply_fast_path(
    model: nn.Module,
    *,
    keep: Keep | Sequence[Keep] = "all",
    fp8_products: bool = False,
    libraries: bool = True,
) -> dict[str, str]:
    """Let the blocks of `model` run as one function each, where they can: for any training loop.

    They do so on packed documents, called as `enable_packing` says, and on the batches with labels of other
    trainers, as `pack_batches` says; both are switched on.

    A block computes again itself what it does not keep. Where a trainer switches gradient checkpointing on,
    a fast block keeps its input and is not run as a whole again.

    Args:
        model: a ``FalconForCausalLM`` from `load_model`, as it is or inside PEFT's wrapper.
        keep: what the blocks keep for the backward pass; one for all, or one a block.
        fp8_products: multiply by the frozen weights in FP8 (e4m3), with LoRA beside it in bfloat16.
        libraries: whether to use FlashAttention-4 and quack-kernels where they are installed and the GPU is
            one of theirs; without them PyTorch and Triton do everything.

    Returns:
        For every block's module name what runs, or why it is left alone.

    Raises:
        UserError: if FP8 is asked for where it cannot run.
    """
    falcon = next((m for m in model.modules() if isinstance(m, FalconForCausalLM)), None)
    if falcon is None:
        raise TypeError(f"no FalconForCausalLM in {type(model).__name__}")
    reason = fp8.why_not(falcon.device, falcon.dtype) if fp8_products else None
    if reason is not None:
        raise UserError(f"{reason}. Use --compute_dtype auto.")
    enable_packing(falcon)
    pack_batches(falcon)
    workspace, offload = Workspace(), Offload()
    gelu = _gelu_products(falcon) if libraries and not fp8_products else None
    report = {}
    blocks = [(n, block) for n, block in falcon.named_modules() if isinstance(block, FalconDecoderLayer)]
    keeps = [keep] * len(blocks) if isinstance(keep, str) else keep
    for (name, block), kept in zip(blocks, keeps, strict=True):
        facts = block_facts(block, falcon.dtype)
        device = falcon.device
        attention = choose_attention(device, facts.dtype, facts.head_dim, libraries=libraries)
        decision = decide(
            facts,
            triton=ops.triton_runs_on(device),
            attention=attention,
            gelu_in_products=gelu is not None,
            fp8_products=fp8_products,
        )
        if decision["block"] == "reference":
            report[name] = f"reference: {decision['reason']}"
            _restore(block)
            continue
        ways = ", ".join(f"{part}: {way}" for part, way in decision.items() if part != "block")
        report[name] = f"fast ({ways})"
        products: MakeProducts = partial(DequantizedProducts, gelu_products=gelu)
        if facts.scaled:
            products = ScaledProducts
        _replace(block, _State(kept, workspace, offload, attention, products))
        if fp8_products:
            parts = _block_and_adapters(block, kept)
            assert parts is not None
            getattr(block, _STATE).products = Fp8.measure(parts[0])
    return report


def fp8_weight_bytes(model: nn.Module) -> int:
    """What `keep_fp8_weights` takes: two bytes a weight of the blocks whose products run in FP8."""
    return sum(
        2 * projection.out_features * projection.in_features
        for _, block in _fp8_blocks(model)
        for projection in block.projections
    )


def keep_fp8_weights(model: nn.Module) -> None:
    """Quantize the frozen weights to FP8 once, rather than for every product; the results are the same."""
    for products, block in _fp8_blocks(model):
        products.keep(block)


def _fp8_blocks(model: nn.Module) -> Iterator[tuple[Fp8, Block]]:
    for module in model.modules():
        state: _State | None = getattr(module, _STATE, None)
        if state is not None and isinstance(state.products, Fp8):
            parts = _block_and_adapters(module, "all")
            assert parts is not None
            yield state.products, parts[0]


def _gelu_products(falcon: FalconForCausalLM) -> GeluProducts | None:
    return gelu_products() if falcon.device.type == "cuda" and falcon.dtype == torch.bfloat16 else None


def remove_fast_path(model: nn.Module) -> None:
    """Undo `apply_fast_path`; the model still takes packed documents.

    Raises:
        RuntimeError: if something else has wrapped a block's forward since; undo that first.
    """
    pack_batches(model, on=False)
    for block in model.modules():
        if isinstance(block, FalconDecoderLayer):
            _restore(block)


def set_keep(block: nn.Module, keep: Keep) -> bool:
    """Change what a block keeps for its backward pass; False where it is no fast one."""
    state: _State | None = getattr(block, _STATE, None)
    if state is not None:
        state.keep = keep
    return state is not None


def _replace(block: FalconDecoderLayer, state: _State) -> None:
    setattr(block, _STATE, state)
    if hasattr(block, _BEFORE):
        return
    setattr(block, _BEFORE, block.__dict__.get("forward"))
    block.forward = MethodType(_block_forward, block)


def _restore(block: FalconDecoderLayer) -> None:
    if not hasattr(block, _BEFORE):
        return
    if getattr(block.forward, "__func__", None) is not _block_forward:
        raise RuntimeError(f"the forward of {type(block).__name__} was wrapped after apply_fast_path")
    before = getattr(block, _BEFORE)
    delattr(block, _BEFORE)
    delattr(block, _STATE)
    del block.forward
    if before is not None:
        block.forward = before


def _norms(block: FalconDecoderLayer) -> tuple[Norm, ...]:
    config = block.config
    two = config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2
    modules = (block.ln_attn, block.ln_mlp) if two else (block.input_layernorm,)
    return tuple(Norm(module.weight, module.bias, module.eps) for module in modules)


def _block_and_adapters(module: FalconDecoderLayer, keep: Keep) -> tuple[Block, list[Adapter]] | None:
    """What the function needs, as the modules say now; None where they say what it cannot do."""
    state: _State = getattr(module, _STATE)
    projections, adapters = [], []
    for linear in linears_of(module):
        base = base_of(linear)
        try:
            name = active_adapter(linear)
        except UnknownAdapter:
            return None
        adapter: Adapter = (None, None)
        rank, scaling, dropout = 0, 1.0, None
        if name is not None:
            p = dropout_of(linear, name) if linear.training else 0.0
            if p and isinstance(state.products, Fp8):
                return None
            dropout = Dropout.draw(p) if p else None
            adapter = (linear.lora_A[name].weight, linear.lora_B[name].weight)
            rank, scaling = linear.lora_A[name].out_features, linear.scaling[name]
        vectors = scale_and_bias_of(base)
        if (vectors is not None) != (state.products is ScaledProducts):
            return None
        if vectors is not None:
            if rank or not vectors.enabled:
                return None
            adapter = (vectors.scale, vectors.bias)
        if rank and prefix_of(module.self_attention) is not None:
            return None
        projections.append(Projection(base, base.out_features, base.in_features, rank, scaling, dropout))
        adapters.append(adapter)
    norms = _norms(module)
    if state.products is ScaledProducts:
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
        keep="input" if keep == "offload" else keep,
    )
    return block, adapters


def _block_forward(
    self: FalconDecoderLayer,
    hidden_states: Tensor,
    alibi: Tensor | None = None,
    attention_mask: Sequences | Tensor | None = None,
    *args: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    state: _State = getattr(self, _STATE)
    keep = state.keep
    if self.gradient_checkpointing and self.training and not _RECOMPUTES_IN_CALL and keep != "offload":
        keep = "input"
    parts = _block_and_adapters(self, keep) if isinstance(attention_mask, Sequences) else None
    if parts is None:
        before = getattr(self, _BEFORE) or partial(type(self).forward, self)
        kwargs["position_embeddings"] = position_embeddings
        return before(hidden_states, alibi, attention_mask, *args, **kwargs)
    assert isinstance(attention_mask, Sequences)
    assert position_embeddings is not None
    # Not ``[0]``: its gradient would be written into zeros, row by row.
    hidden, (cosine, sine) = hidden_states.squeeze(0), (each[0] for each in position_embeddings)
    attention = _attention(self, parts[0], PackedAttention(attention_mask, state.attention), hidden.dtype)
    with state.offload.moving(hidden) if keep == "offload" else nullcontext():
        output = run_block(hidden, cosine, sine, parts[0], attention, parts[1])
    return output.unsqueeze(0), None


def _attention(
    module: FalconDecoderLayer, block: Block, attention: PackedAttention, dtype: torch.dtype
) -> PackedAttention | PrefixedAttention:
    """With the block's prefix, where it has one that acts."""
    prefix = prefix_of(module.self_attention)
    if prefix is None or not prefix.enabled:
        return attention
    # Not through the module: in 8 bits it would round what goes in, and wait for the GPU.
    fused = project(prefix.prefix.to(dtype), block.query_key_value, block.workspace)
    vectors = scale_and_bias_of(module.self_attention.query_key_value)
    if vectors is not None:
        fused = vectors(fused)
    _, key, value = split_heads(fused, module.self_attention)
    return PrefixedAttention(attention, key, value, prefix.gate)
