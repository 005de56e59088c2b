"""What the fast path has to know of a block, read off its modules, and what runs where because of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer

from falcon_qlora.kernels import prefix
from falcon_qlora.models.fast_attention import AttentionKernel
from falcon_qlora.models.prefix import prefix_of
from falcon_qlora.models.quantize import QuantizeMode, bnb
from falcon_qlora.models.scaled import scale_and_bias_of

from peft.tuners.lora import LoraLayer  # isort: skip  # after bitsandbytes, see models/quantize.py


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """What `decide` has to know about a block.

    Attributes:
        alibi: positions by ALiBi rather than by rotation.
        parallel: attention and feed-forward both start from the block's input.
        biases: whether any linear has one.
        activation: of the feed-forward layer.
        hidden_dropout: on the block's output.
        trainable: names of trainable parameters that are of no adapter; Adapter v2's has the norms.
        dtype: of the activations.
        device_type: where the block is.
        head_dim: size of a head.
        quantize_mode: how the linears are stored.
        lora_dropout: the largest of the active adapters'.
        lora_unknown: what about the adapters is not plain LoRA, or None.
        prefix_rows: P of a learned prefix, 0 without one.
        scaled: whether learned vectors scale and shift the linears' outputs.
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
    prefix_rows: int = 0
    scaled: bool = False


def decide(
    facts: BlockFacts,
    *,
    triton: bool,
    attention: AttentionKernel,
    gelu_in_products: bool = False,
    fp8_products: bool = False,
) -> dict[str, str]:
    """Say what runs where in a block, and why.

    Args:
        facts: of the block.
        triton: whether Triton's forms of the operations between the products can run.
        attention: the fastest kernel for these heads on this GPU.
        gelu_in_products: whether GELU is computed in the epilogues of products.
        fp8_products: whether the frozen products are to run in FP8.

    Returns:
        ``block``: ``fast`` or ``reference``. With ``reference`` also ``reason``; with ``fast`` what computes
        ``attention``, ``weights``, ``GELU`` and ``between`` (norms, rotation), and ``prefix`` and ``scales``
        where there are any.
    """
    reason = _why_not(facts, fp8_products)
    if reason is not None:
        return {"block": "reference", "reason": reason}
    small = "Triton" if triton else "PyTorch"
    stored = {"4bit": "NF4 dequantized", "8bit": "int8 dequantized", "16bit": "as stored"}
    if fp8_products:
        stored = {"4bit": "NF4 dequantized to FP8", "8bit": "int8 dequantized to FP8", "16bit": "in FP8"}
    ways = {
        "block": "fast",
        "attention": attention,
        "weights": stored[facts.quantize_mode],
        "GELU": _gelu(facts, small) if gelu_in_products else small,
        "between": small,
    }
    if facts.prefix_rows:
        ways["prefix"] = small if facts.prefix_rows <= prefix.MOST_ROWS else "PyTorch"
    if facts.scaled:
        ways["scales"] = small
    return ways


def _gelu(facts: BlockFacts, small: str) -> str:
    """What computes GELU where products can."""
    if facts.scaled:
        return small
    return f"in products forward, {small} backward" if facts.lora_dropout else "in products"


def _why_not(facts: BlockFacts, fp8_products: bool) -> str | None:
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
    if facts.lora_dropout and fp8_products:
        return f"LoRA dropout {facts.lora_dropout:g}, which does not go with FP8"
    if facts.scaled and fp8_products:
        return "scales and biases on the linears (Adapter v2), which do not go with FP8"
    if facts.prefix_rows and fp8_products:
        return "attention looks at a learned prefix (Adapter), which does not go with FP8"
    return None


def block_facts(block: FalconDecoderLayer, dtype: torch.dtype) -> BlockFacts:
    """Read off a block what `decide` has to know; `dtype` is that of the activations."""
    config = block.config
    linears = linears_of(block)
    added = prefix_of(block.self_attention)
    known = {id(p) for linear in linears if isinstance(linear, LoraLayer) for p in _matrices(linear)}
    known |= {id(p) for p in (added.parameters() if added is not None else ())}
    vectors = [scale_and_bias_of(base_of(linear)) for linear in linears]
    scaled = all(each is not None for each in vectors)
    if scaled:
        norms = [module for module in block.modules() if isinstance(module, nn.LayerNorm)]
        known |= {id(p) for module in [*vectors, *norms] if module is not None for p in module.parameters()}
    dropouts, unknown = [0.0], _more_than_lora(block)
    for linear in linears:
        try:
            active = active_adapter(linear)
        except UnknownAdapter as error:
            unknown = unknown or str(error)
            continue
        if active is not None:
            dropouts.append(dropout_of(linear, active))
    base = base_of(linears[0])
    mode: QuantizeMode = "16bit"
    if isinstance(base, bnb.nn.Linear4bit):
        mode = "4bit"
    elif isinstance(base, bnb.nn.Linear8bitLt):
        mode = "8bit"
    return BlockFacts(
        alibi=config.alibi,
        parallel=config.parallel_attn or config.new_decoder_architecture,
        biases=any(base_of(linear).bias is not None for linear in linears),
        activation=config.activation,
        hidden_dropout=config.hidden_dropout,
        trainable=tuple(n for n, p in block.named_parameters() if p.requires_grad and id(p) not in known),
        dtype=dtype,
        device_type=base.weight.device.type,
        head_dim=block.self_attention.head_dim,
        quantize_mode=mode,
        lora_dropout=max(dropouts),
        lora_unknown=unknown,
        prefix_rows=0 if added is None else len(added.prefix),
        scaled=scaled,
    )


def _more_than_lora(block: FalconDecoderLayer) -> str | None:
    """What acts in a block beside LoRA, trainable or not."""
    linears = linears_of(block)
    vectors = [scale_and_bias_of(base_of(linear)) is not None for linear in linears]
    if any(vectors) and not all(vectors):
        return "scales and biases on some of the linears"
    if any(isinstance(linear, LoraLayer) for linear in linears):
        if any(vectors):
            return "LoRA beside scales and biases on the linears (Adapter v2)"
        if prefix_of(block.self_attention) is not None:
            return "LoRA where attention looks at a learned prefix (Adapter)"
    return None


class UnknownAdapter(Exception):
    """An adapter that is more than two matrices."""


def active_adapter(linear: Any) -> str | None:
    """The name of the one adapter that adds to `linear`'s output, None where there is none."""
    if not isinstance(linear, LoraLayer) or linear.disable_adapters or linear.merged:
        return None
    names = [name for name in linear.active_adapters if name in linear.lora_A]
    if not names:
        return None
    if len(names) > 1:
        raise UnknownAdapter(f"{len(names)} adapters are active")
    if names[0] in linear.lora_variant:
        variant = type(linear.lora_variant[names[0]]).__name__.removesuffix("LinearVariant")
        raise UnknownAdapter(f"{variant} instead of plain LoRA")
    if linear.lora_bias[names[0]]:
        raise UnknownAdapter("LoRA with a bias")
    return names[0]


def dropout_of(linear: Any, name: str) -> float:
    """The dropout of an adapter's input."""
    return getattr(linear.lora_dropout[name], "p", 0.0)  # an nn.Identity where there is none


def _matrices(linear: Any) -> list[nn.Parameter]:
    return [*linear.lora_A.parameters(), *linear.lora_B.parameters()]


def base_of(linear: Any) -> Any:
    """The frozen linear itself."""
    return linear.get_base_layer() if isinstance(linear, LoraLayer) else linear


def linears_of(block: FalconDecoderLayer) -> list[Any]:
    """In the order of ``Block.projections``."""
    attention, mlp = block.self_attention, block.mlp
    return [attention.query_key_value, mlp.dense_h_to_4h, mlp.dense_4h_to_h, attention.dense]
