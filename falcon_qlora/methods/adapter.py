"""Adapter (LLaMA-Adapter, as Lit-Parrot has it for Falcon): a learned prefix in all but the first blocks.

The definition is in models/prefix.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from falcon_qlora.common.errors import UserError
from falcon_qlora.methods.interface import Method, remember, setting, switched_off

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Adapter(Method):
    """Train prefixes and their gates."""

    prefix_length: int = setting(
        10, "Rows of the prefix in each block.", name="adapter_prefix_length", label="prefix of {}", least=1
    )
    first_block: int = setting(
        2, "The first block that has a prefix.", name="adapter_first_block", label="from block {} on", least=0
    )

    name: ClassVar[str] = "adapter"
    title: ClassVar[str] = "Adapter"
    trains: ClassVar[str] = "a learned prefix in attention"
    why_not_merged: ClassVar[str | None] = (
        "attention reads the learned prefix in a softmax of its own, which no weights of the model express"
    )
    kinds: ClassVar[dict[str, str]] = {".prefix": "prefixes", ".gate": "gates"}
    starts_at_zero: ClassVar[tuple[str, ...]] = (".gate",)

    def saved_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        from falcon_qlora.models.layouts import layout_of
        from falcon_qlora.models.layouts.base import PREFIX

        layout = layout_of(config)
        if layout.no_prefix is not None:
            raise UserError(
                f"--method {self.name} does not train a {layout.family}: {layout.no_prefix}. "
                "Use --method lora"
            )
        shapes: dict[str, tuple[int, ...]] = {}
        for block in self._blocks(config):
            name = f"{layout.backbone}.{layout.blocks}.{block}.{layout.attention}.{PREFIX}"
            shapes[f"{name}.prefix"] = (self.prefix_length, config.hidden_size)
            shapes[f"{name}.gate"] = (config.num_attention_heads,)
        return shapes

    def attach(self, model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
        self.add_prefixes(model, seed)
        remember(model, self)
        return model.train()

    def disabled(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        from falcon_qlora.models.prefix import prefixes

        return switched_off(prefixes(model))

    def add_prefixes(self, model: PreTrainedModel, seed: int) -> None:
        """Add a prefix to every block from `first_block` on, the same on every process."""
        import torch

        from falcon_qlora.models.layouts import layout_of
        from falcon_qlora.models.prefix import add_prefix
        from falcon_qlora.models.quantize import holds_quantized_weight

        generator = torch.Generator().manual_seed(seed)
        layout = layout_of(model.config)
        for place in self._blocks(model.config):
            block = getattr(model.base_model, layout.blocks)[place]
            # Of the magnitude that a norm would give the projection.
            rows = torch.randn(self.prefix_length, model.config.hidden_size, generator=generator)
            add_prefix(getattr(block, layout.attention), rows.to(model.device))
            # LLM.int8() returns a view made inside its autograd function. The block adds to this output
            # in-place, which autograd forbids for such a view where a gradient passes.
            last = block.get_submodule(list(layout.linears.values())[-1])
            if holds_quantized_weight(last, "8bit"):
                last.register_forward_hook(lambda module, inputs, output: output.clone())

    def _blocks(self, config: PreTrainedConfig) -> range:
        blocks = range(self.first_block, config.num_hidden_layers)
        if not blocks:
            raise UserError(
                f"--adapter_first_block {self.first_block}: the model has blocks 0 to "
                f"{config.num_hidden_layers - 1}, so no block would have a prefix"
            )
        return blocks
