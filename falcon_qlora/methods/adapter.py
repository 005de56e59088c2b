"""Adapter (LLaMA-Adapter, as Lit-Parrot has it for Falcon): a learned prefix in all but the first blocks.

The definition is in models/prefix.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from falcon_qlora.common.errors import UserError
from falcon_qlora.methods.folder import restore_adapter, write_adapter
from falcon_qlora.methods.interface import ParameterGroup, remember
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.prefix import PREFIX, add_prefix, prefixes
from falcon_qlora.models.quantize import holds_quantized_weight


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Train prefixes and their gates.

    Args:
        prefix_length: rows of each prefix.
        first_block: the first block that has one.
    """

    prefix_length: int = 10
    first_block: int = 2

    name: ClassVar[str] = "adapter"
    title: ClassVar[str] = "Adapter"
    trains_in_float32: ClassVar[bool] = True
    why_not_merged: ClassVar[str | None] = (
        "attention reads the learned prefix in a softmax of its own, which no weights of the model express"
    )

    def describe(self) -> str:
        return f"{self.title}, prefix of {self.prefix_length} in every block from {self.first_block} on"

    def parameter_groups(self, config: PreTrainedConfig) -> list[ParameterGroup]:
        return prefix_groups(config, length=self.prefix_length, first_block=self.first_block)

    def saved_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        """Name in the file → shape, of every tensor of a saved adapter of a model of `config`."""
        return prefix_shapes(config, length=self.prefix_length, first_block=self.first_block)

    def attach(self, model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
        add_prefixes(model, length=self.prefix_length, first_block=self.first_block, seed=seed)
        remember(model, self)
        return model.train()

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        write_adapter(folder, model, self.name, asdict(self))

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        restore_adapter(folder, model)

    def disabled(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return switched_off(prefixes(model))


def prefix_groups(config: PreTrainedConfig, *, length: int, first_block: int) -> list[ParameterGroup]:
    """What the prefixes of a model of this configuration are.

    Raises:
        UserError: if it has no block for one.
    """
    blocks = config.num_hidden_layers - first_block
    if blocks < 1:
        raise UserError(
            f"--adapter_first_block {first_block}: the model has blocks 0 to {config.num_hidden_layers - 1}, "
            "so no block would have a prefix"
        )
    return [
        ParameterGroup(kind="prefixes", count=blocks * length * config.hidden_size),
        ParameterGroup(kind="gates", count=blocks * config.num_attention_heads),
    ]


def prefix_shapes(config: PreTrainedConfig, *, length: int, first_block: int) -> dict[str, tuple[int, ...]]:
    """Name → shape, of the prefixes and gates of a model of this configuration.

    Raises:
        UserError: if it has no block for one.
    """
    prefix_groups(config, length=length, first_block=first_block)  # refuses what cannot be
    shapes: dict[str, tuple[int, ...]] = {}
    layout = layout_of(config)
    for block in range(first_block, config.num_hidden_layers):
        name = f"{layout.backbone}.{layout.blocks}.{block}.{layout.attention}.{PREFIX}"
        shapes[f"{name}.prefix"] = (length, config.hidden_size)
        shapes[f"{name}.gate"] = (config.num_attention_heads,)
    return shapes


def add_prefixes(model: PreTrainedModel, *, length: int, first_block: int, seed: int) -> None:
    """Add a prefix to every block from `first_block` on, the same on every process."""
    prefix_groups(model.config, length=length, first_block=first_block)  # refuses what cannot be
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of(model.config)
    for block in getattr(model.base_model, layout.blocks)[first_block:]:
        # Of the size that a norm would hand to the projection.
        rows = torch.randn(length, model.config.hidden_size, generator=generator)
        add_prefix(getattr(block, layout.attention), rows.to(model.device))
        # LLM.int8() gives out a view made inside its autograd function. The block adds to this one in place,
        # which autograd forbids where a gradient passes.
        last = block.get_submodule(list(layout.linears.values())[-1])
        if holds_quantized_weight(last, "8bit"):
            last.register_forward_hook(_in_memory_of_its_own)


def _in_memory_of_its_own(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.clone()


@contextmanager
def switched_off(modules: Iterable[Any]) -> Iterator[None]:
    """Have these modules, which have a switch `enabled`, do nothing."""
    modules = list(modules)
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.enabled = True
