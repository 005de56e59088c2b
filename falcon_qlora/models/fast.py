"""The fast path: a loaded model's blocks run as single autograd functions over packed documents.

`apply_fast_path` gives single blocks another ``forward``, reversibly; nothing is changed at import. A block
whose layout or adapter the fast path does not know keeps its own, and so does a call without packed
documents. PEFT's modules stay where they are: their matrices are read at every call, and get the gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import FalconForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.block import Block, Norm, run_block
from falcon_qlora.kernels.frozen_linear import Adapter, Projection, Workspace
from falcon_qlora.models.attention import Sequences, _takes_varlen, packed_attention
from falcon_qlora.models.prefix import prefix_of
from falcon_qlora.models.quantize import QuantizeMode, bnb
from falcon_qlora.models.scaled import scale_and_bias_of

from peft.tuners.lora import LoraLayer  # isort: skip  # after bitsandbytes, see models/quantize.py

_BEFORE = "_forward_before_fast_path"
_WORKSPACE = "_fast_path_workspace"
# Older releases of Transformers recompute in ``__call__``, which comes before our forward anyway.
_RECOMPUTES_IN_CALL = "__call__" in vars(GradientCheckpointingLayer)


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """What `decide` has to know about a block.

    Attributes:
        alibi: positions by ALiBi rather than by rotation.
        parallel: attention and feed-forward both start from the block's input.
        biases: whether any linear has one.
        activation: of the feed-forward layer.
        hidden_dropout: on the block's output.
        trainable: names of trainable parameters that are no LoRA matrices.
        dtype: of the activations.
        device_type: where the block is.
        head_dim: size of a head.
        quantize_mode: how the linears are stored.
        lora_dropout: the largest of the active adapters'.
        lora_unknown: what about the adapters is not plain LoRA, or None.
    """

    alibi: bool
    parallel: bool
    biases: bool
    activation: str
    hidden_dropout: float
    trainable: tuple[str, ...]
    dtype: torch.dtype
    device_type: str
    head_dim: int
    quantize_mode: QuantizeMode
    lora_dropout: float
    lora_unknown: str | None


def decide(facts: BlockFacts, *, triton: bool, variable_length_kernel: bool) -> dict[str, str]:
    """Say what runs where in a block, and why.

    Args:
        facts: of the block.
        triton: whether Triton's forms of the operations between the products can run.
        variable_length_kernel: whether the GPU has the packed attention kernel for this dtype.

    Returns:
        ``block``: ``fast`` or ``reference``. With ``reference`` also ``reason``; with ``fast`` what computes
        ``attention``, ``weights`` and ``between`` (norms, rotation, GELU).
    """
    reason = _why_not(facts)
    if reason is not None:
        return {"block": "reference", "reason": reason}
    stored = {"4bit": "NF4 dequantized", "8bit": "int8 dequantized", "16bit": "as stored"}
    return {
        "block": "fast",
        "attention": "variable-length kernel" if variable_length_kernel else "padded batches",
        "weights": stored[facts.quantize_mode],
        "between": "Triton" if triton else "PyTorch",
    }


def _why_not(facts: BlockFacts) -> str | None:
    if facts.alibi:
        return "positions by ALiBi"
    if not facts.parallel:
        return "attention and feed-forward are not parallel"
    if facts.biases:
        return "linears with biases"
    if facts.activation != "gelu":
        return f"activation {facts.activation}"
    if facts.hidden_dropout:
        return f"hidden dropout {facts.hidden_dropout:g}"
    if facts.dtype not in (torch.bfloat16, torch.float32):
        return f"computes in {str(facts.dtype).removeprefix('torch.')}"
    if facts.lora_unknown:
        return facts.lora_unknown
    if facts.trainable:
        return f"trains more than LoRA: {facts.trainable[0]}"
    if facts.lora_dropout:
        return f"LoRA dropout {facts.lora_dropout:g}"
    return None


def apply_fast_path(model: nn.Module) -> dict[str, str]:
    """Let the blocks of `model` run as one function each, where they can, when called with packed documents.

    Args:
        model: a ``FalconForCausalLM`` from `load_model`, as it is or inside PEFT's wrapper, with
            `enable_packing`.

    Returns:
        For every block's module name what runs, or why it is left alone.
    """
    falcon = next((m for m in model.modules() if isinstance(m, FalconForCausalLM)), None)
    if falcon is None:
        raise TypeError(f"no FalconForCausalLM in {type(model).__name__}")
    workspace = Workspace()
    report = {}
    for name, block in falcon.named_modules():
        if not isinstance(block, FalconDecoderLayer):
            continue
        decision = _decide(block, falcon)
        if decision["block"] == "reference":
            report[name] = f"reference: {decision['reason']}"
            _restore(block)
            continue
        ways = ", ".join(f"{part}: {way}" for part, way in decision.items() if part != "block")
        report[name] = f"fast ({ways})"
        _replace(block, workspace)
    return report


def remove_fast_path(model: nn.Module) -> None:
    """Undo `apply_fast_path`.

    Raises:
        RuntimeError: if something else has wrapped a block's forward since; undo that first.
    """
    for block in model.modules():
        if isinstance(block, FalconDecoderLayer):
            _restore(block)


def _replace(block: FalconDecoderLayer, workspace: Workspace) -> None:
    setattr(block, _WORKSPACE, workspace)
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
    delattr(block, _WORKSPACE)
    del block.forward
    if before is not None:
        block.forward = before


def _decide(block: FalconDecoderLayer, falcon: FalconForCausalLM) -> dict[str, str]:
    facts = block_facts(block, falcon.dtype)
    weight = _base(_linears(block)[0]).weight
    return decide(
        facts,
        triton=ops.triton_runs_on(weight.device),
        variable_length_kernel=_takes_varlen(weight.device, facts.dtype, facts.head_dim, 0.0),
    )


def block_facts(block: FalconDecoderLayer, dtype: torch.dtype) -> BlockFacts:
    """Read off a block what `decide` has to know; `dtype` is that of the activations."""
    config = block.config
    linears = _linears(block)
    of_lora = {id(p) for linear in linears if isinstance(linear, LoraLayer) for p in _matrices(linear)}
    dropouts, unknown = [0.0], _more_than_lora(block)
    for linear in linears:
        try:
            active = _active_adapter(linear)
        except _UnknownAdapter as error:
            unknown = unknown or str(error)
            continue
        if active is not None:
            dropouts.append(_dropout(linear, active))
    base = _base(linears[0])
    mode: QuantizeMode = "16bit"
    if isinstance(base, bnb.nn.Linear4bit):
        mode = "4bit"
    elif isinstance(base, bnb.nn.Linear8bitLt):
        mode = "8bit"
    return BlockFacts(
        alibi=config.alibi,
        parallel=config.parallel_attn or config.new_decoder_architecture,
        biases=any(_base(linear).bias is not None for linear in linears),
        activation=config.activation,
        hidden_dropout=config.hidden_dropout,
        trainable=tuple(n for n, p in block.named_parameters() if p.requires_grad and id(p) not in of_lora),
        dtype=dtype,
        device_type=base.weight.device.type,
        head_dim=block.self_attention.head_dim,
        quantize_mode=mode,
        lora_dropout=max(dropouts),
        lora_unknown=unknown,
    )


def _more_than_lora(block: FalconDecoderLayer) -> str | None:
    """What acts in a block beside LoRA, trainable or not."""
    if any(scale_and_bias_of(_base(linear)) is not None for linear in _linears(block)):
        return "scales and biases on the linears (Adapter v2)"
    if prefix_of(block.self_attention) is not None:
        return "attention looks at a learned prefix (Adapter)"
    return None


class _UnknownAdapter(Exception):
    """An adapter that is more than two matrices."""


def _active_adapter(linear: Any) -> str | None:
    """The name of the one adapter that adds to `linear`'s output, None where there is none."""
    if not isinstance(linear, LoraLayer) or linear.disable_adapters or linear.merged:
        return None
    names = [name for name in linear.active_adapters if name in linear.lora_A]
    if not names:
        return None
    if len(names) > 1:
        raise _UnknownAdapter(f"{len(names)} adapters are active")
    if names[0] in linear.lora_variant:
        variant = type(linear.lora_variant[names[0]]).__name__.removesuffix("LinearVariant")
        raise _UnknownAdapter(f"{variant} instead of plain LoRA")
    if linear.lora_bias[names[0]]:
        raise _UnknownAdapter("LoRA with a bias")
    return names[0]


def _dropout(linear: Any, name: str) -> float:
    return getattr(linear.lora_dropout[name], "p", 0.0)  # an nn.Identity where there is none


def _matrices(linear: Any) -> list[nn.Parameter]:
    return [*linear.lora_A.parameters(), *linear.lora_B.parameters()]


def _base(linear: Any) -> Any:
    return linear.get_base_layer() if isinstance(linear, LoraLayer) else linear


def _linears(block: FalconDecoderLayer) -> list[Any]:
    """In the order of ``Block.projections``."""
    attention, mlp = block.self_attention, block.mlp
    return [attention.query_key_value, mlp.dense_h_to_4h, mlp.dense_4h_to_h, attention.dense]


def _norms(block: FalconDecoderLayer) -> tuple[Norm, ...]:
    config = block.config
    two = config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2
    modules = (block.ln_attn, block.ln_mlp) if two else (block.input_layernorm,)
    return tuple(Norm(module.weight, module.bias, module.eps) for module in modules)


def _block_and_adapters(module: FalconDecoderLayer) -> tuple[Block, list[Adapter]] | None:
    """What the function needs, as the modules say now; None where they say what it cannot do."""
    projections, adapters = [], []
    for linear in _linears(module):
        base = _base(linear)
        try:
            name = _active_adapter(linear)
        except _UnknownAdapter:
            return None
        adapter: Adapter = (None, None)
        rank, scaling = 0, 1.0
        if name is not None:
            if linear.training and _dropout(linear, name):
                return None
            adapter = (linear.lora_A[name].weight, linear.lora_B[name].weight)
            rank, scaling = linear.lora_A[name].out_features, linear.scaling[name]
        projections.append(Projection(base, base.out_features, base.in_features, rank, scaling))
        adapters.append(adapter)
    query_key_value, dense_h_to_4h, dense_4h_to_h, dense = projections
    block = Block(
        norms=_norms(module),
        query_key_value=query_key_value,
        dense_h_to_4h=dense_h_to_4h,
        dense_4h_to_h=dense_4h_to_h,
        dense=dense,
        kv_heads=module.self_attention.num_kv_heads,
        head_dim=module.self_attention.head_dim,
        workspace=getattr(module, _WORKSPACE),
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
    parts = _block_and_adapters(self) if isinstance(attention_mask, Sequences) else None
    if parts is None:
        before = getattr(self, _BEFORE) or partial(type(self).forward, self)
        kwargs["position_embeddings"] = position_embeddings
        return before(hidden_states, alibi, attention_mask, *args, **kwargs)
    assert isinstance(attention_mask, Sequences)
    assert position_embeddings is not None
    block, adapters = parts
    run = partial(_run, position_embeddings, attention_mask, block, adapters)
    if self.gradient_checkpointing and self.training and not _RECOMPUTES_IN_CALL:
        return self._gradient_checkpointing_func(run, hidden_states), None
    return run(hidden_states), None


def _run(
    position_embeddings: tuple[Tensor, Tensor],
    sequences: Sequences,
    block: Block,
    adapters: list[Adapter],
    hidden_states: Tensor,
) -> Tensor:
    cosine, sine = position_embeddings
    return run_block(hidden_states[0], cosine[0], sine[0], block, PackedAttention(sequences), adapters)[None]


@dataclass(frozen=True, eq=False)
class PackedAttention:
    """Causal attention within documents, forward and backward.

    On recent GPUs it is PyTorch's variable-length kernel, called as `varlen_attn` does; elsewhere
    `packed_attention`, computed again in the backward pass.
    """

    sequences: Sequences

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not _takes_varlen(query.device, query.dtype, query.shape[-1], 0.0):
            return packed_attention(query, key, value, self.sequences), ()
        output, log_sum_exp, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *self._documents(), 0.0, True, False, **_window(query)
        )
        return output, (log_sum_exp, state, unused)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        statistics: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        if statistics:
            log_sum_exp, *state = statistics
            inputs = (grad, query, key, value, output, log_sum_exp)
            return torch.ops.aten._flash_attention_backward(
                *inputs, *self._documents(), 0.0, True, *state, **_window(query)
            )
        query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        with torch.enable_grad():
            again = packed_attention(query, key, value, self.sequences)
        of_query, of_key, of_value = torch.autograd.grad(again, (query, key, value), grad)
        return of_query, of_key, of_value

    def _documents(self) -> tuple[Tensor, Tensor, int, int]:
        starts, longest = self.sequences.cu_seqlens, self.sequences.max_length
        return starts, starts, longest, longest


def _window(query: Tensor) -> dict[str, Any]:
    return {
        "scale": 1.0 / math.sqrt(query.shape[-1]),
        "window_size_left": -1,
        "window_size_right": 0,
    }
