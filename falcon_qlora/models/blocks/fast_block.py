"""What every family's fast blocks share: the facts for choosing them, their state, and their installation.

A block's ``forward`` is replaced on the instance, reversibly: nothing is changed at import. PEFT's modules
stay in place: their matrices are read at every call and get the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from falcon_qlora.kernels.block import Block, Products
from falcon_qlora.kernels.frozen_linear import Adapter, Workspace
from falcon_qlora.kernels.offload import Offload
from falcon_qlora.models.blocks.attention import AttentionKernel
from falcon_qlora.models.forward import forward_is_replaced, replace_forward, restore_forward
from falcon_qlora.models.quantize import QuantizeMode

_STATE = "_fast_path_state"

Keep = Literal["all", "attention", "input", "offload"]
"""What a block keeps for its backward pass, see `Block.keep`; ``offload``: its input, in CPU memory."""

MakeProducts = Callable[[Block, Sequence[Adapter]], Products]


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """What `fast_path.decide` has to know about a block.

    Attributes:
        unlike: what its family's fast block does not compute, or None.
        trainable: names of trainable parameters that belong to no adapter; norms belong to Adapter v2's.
        dtype: of the activations.
        head_dim: size of a head.
        quantize_mode: how the linears are stored.
        lora_dropout: the largest of the active adapters'.
        lora_unknown: what is not plain LoRA in the adapters, or None.
        prefix_rows: P of a learned prefix, 0 without one.
        scaled: whether learned vectors scale and shift the linears' outputs.
    """

    unlike: str | None
    trainable: tuple[str, ...]
    dtype: torch.dtype
    head_dim: int
    quantize_mode: QuantizeMode
    lora_dropout: float
    lora_unknown: str | None
    prefix_rows: int = 0
    scaled: bool = False


@dataclass
class State:
    """A fast block's state: what it keeps and runs on, and what it shares with the model's other blocks."""

    keep: Keep
    workspace: Workspace
    offload: Offload
    attention: AttentionKernel
    products: MakeProducts


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
