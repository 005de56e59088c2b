"""What every family's fast blocks share: the facts for choosing them, their state, and their installation.

A block's ``forward`` is replaced on the instance, reversibly: nothing is changed at import. PEFT's modules
stay in place: their matrices are read at every call and get the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from falcon_qlora.common.fp8 import fp8_excludes
from falcon_qlora.kernels import block as kernel
from falcon_qlora.kernels.block import Block, Products
from falcon_qlora.kernels.fp8_block import Fp8
from falcon_qlora.kernels.frozen_linear import Adapter, Projection
from falcon_qlora.kernels.low_rank import Dropout
from falcon_qlora.kernels.offload import Offload
from falcon_qlora.kernels.sublayer import Fp8Sublayers
from falcon_qlora.kernels.workspace import Workspace
from falcon_qlora.models.blocks.attention import AttentionKernel
from falcon_qlora.models.forward import forward_is_replaced, replace_forward, restore_forward
from falcon_qlora.models.prefix import prefix_of
from falcon_qlora.models.quantize import QuantizeMode, quantize_mode_of

_STATE = "_fast_path_state"

# Older releases of Transformers recompute in ``__call__``, which runs before a fast block's forward anyway.
_RECOMPUTES_IN_CALL = "__call__" in vars(GradientCheckpointingLayer)

Keep = Literal["all", "attention", "input", "offload"]
"""What a block keeps for its backward pass, see `Block.keep`; ``offload``: its input, in CPU memory."""

MakeProducts = Callable[[Block, Sequence[Adapter]], Products]

Frozen8 = Fp8 | Fp8Sublayers
"""A block's weights for products in FP8."""


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """What `fast_path.decide` has to know about a block.

    Attributes:
        unlike: what its family's fast block does not compute, or None.
        trainable: names of trainable parameters that belong to no adapter; norms belong to Adapter v2's.
        dtype: of the activations.
        heads: Q, G and D of attention.
        quantize_mode: how the linears are stored.
        lora_dropout: the largest of the active adapters'.
        lora_unknown: what is not plain LoRA in the adapters, or None.
        prefix_rows: P of a learned prefix, 0 without one.
        scaled: whether learned vectors scale and shift the linears' outputs.
        activation: of the feed-forward layer.
        state_space: P and N of a state space beside attention, or None.
        leaves_rows_out: whether it computes the feed-forward layer of wanted tokens alone, see `Block.rows`.
    """

    unlike: str | None
    trainable: tuple[str, ...]
    dtype: torch.dtype
    heads: tuple[int, int, int]
    quantize_mode: QuantizeMode
    lora_dropout: float
    lora_unknown: str | None
    prefix_rows: int = 0
    scaled: bool = False
    activation: str = "GELU"
    state_space: tuple[int, int] | None = None
    leaves_rows_out: bool = False


def facts_of(
    block: nn.Module,
    linears: Sequence[Any],
    attention: Any,
    kv_heads: int,
    dtype: torch.dtype,
    *,
    unlike: str | None,
    lora_unknown: str | None,
    known: Iterable[nn.Parameter] = (),
    **more: Any,
) -> BlockFacts:
    """The facts about a block, of which those alike in all families are found here.

    Args:
        block: of any family.
        linears: all of its linears.
        attention: its attention.
        kv_heads: G.
        dtype: of the activations.
        unlike: as in `BlockFacts`.
        lora_unknown: a mix of adapters that the fast block does not compute, or None.
        known: trained parameters that it computes gradients of, beside LoRA's and a prefix's.
        more: other fields of `BlockFacts`.
    """
    added = prefix_of(attention)
    of_prefix = added.parameters() if added is not None else ()
    of_lora = (parameter for linear in linears for parameter in lora_parameters(linear))
    ours = {id(parameter) for parameter in (*of_lora, *of_prefix, *known)}
    dropouts = [0.0]
    for linear in linears:
        try:
            active = active_adapter(linear)
        except UnknownAdapter as error:
            lora_unknown = lora_unknown or str(error)
            continue
        if active is not None:
            dropouts.append(dropout_of(linear, active))
    if any(base_of(linear).bias is not None for linear in linears):
        unlike = unlike or "linears with biases"
    return BlockFacts(
        unlike=unlike,
        trainable=tuple(n for n, p in block.named_parameters() if p.requires_grad and id(p) not in ours),
        dtype=dtype,
        heads=(attention.config.num_attention_heads, kv_heads, attention.head_dim),
        quantize_mode=quantize_mode_of(base_of(linears[0])),
        lora_dropout=max(dropouts),
        lora_unknown=lora_unknown,
        prefix_rows=0 if added is None else len(added.prefix),
        **more,
    )


@dataclass
class State:
    """A fast block's state: what it keeps and runs on, and what it shares with the model's other blocks."""

    keep: Keep
    workspace: Workspace
    offload: Offload
    attention: AttentionKernel
    products: MakeProducts | Fp8Sublayers


def state_of(block: nn.Module) -> State | None:
    """The state of a fast block; None for any other."""
    return getattr(block, _STATE, None)


def install(block: nn.Module, forward: Callable[..., Any], state: State) -> None:
    """Make `block` run `forward`, which finds `state` on the block."""
    setattr(block, _STATE, state)
    if not forward_is_replaced(block):
        replace_forward(block, forward)


def restore(block: nn.Module, forward: Callable[..., Any]) -> None:
    """Undo `install`.

    Raises:
        RuntimeError: if something else has wrapped the block's forward since.
    """
    if forward_is_replaced(block):
        restore_forward(block, forward, "apply_fast_path")
        delattr(block, _STATE)


class UnknownAdapter(Exception):
    """An adapter that is not just two matrices."""


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


def projection_of(linear: Any, state: State) -> tuple[Projection, Adapter]:
    """A linear with its active LoRA.

    Raises:
        UnknownAdapter: if the products cannot compute it.
    """
    base, name = base_of(linear), active_adapter(linear)
    if name is None:
        return Projection(base, base.out_features, base.in_features), (None, None)
    p = dropout_of(linear, name) if linear.training else 0.0
    if isinstance(state.products, Frozen8) and fp8_excludes(lora_dropout=p):
        raise UnknownAdapter("LoRA dropout")
    a, b = linear.lora_A[name], linear.lora_B[name]
    dropout = Dropout.draw(p) if p else None
    projection = Projection(
        base, base.out_features, base.in_features, a.out_features, linear.scaling[name], dropout
    )
    return projection, (a.weight, b.weight)


def kept_by(block: Any, state: State) -> kernel.Keep:
    """What a call of a fast block keeps for its backward pass, for `kernels`."""
    if state.keep == "offload" or (
        block.gradient_checkpointing and block.training and not _RECOMPUTES_IN_CALL
    ):
        return "input"
    return state.keep


def dropout_of(linear: Any, name: str) -> float:
    """The dropout of an adapter's input."""
    return getattr(linear.lora_dropout[name], "p", 0.0)  # an nn.Identity where there is none


def lora_parameters(linear: Any) -> list[nn.Parameter]:
    """LoRA's matrices on a linear; none where it has none."""
    if not isinstance(linear, LoraLayer):
        return []
    return [*linear.lora_A.parameters(), *linear.lora_B.parameters()]


def base_of(linear: Any) -> Any:
    """The frozen linear itself."""
    return linear.get_base_layer() if isinstance(linear, LoraLayer) else linear
