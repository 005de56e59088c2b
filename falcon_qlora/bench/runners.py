"""Builds a variant of the training step on a loaded base model, and removes it again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.bench.documents import Document
from falcon_qlora.bench.variants import Impossible, Variant
from falcon_qlora.data.packing import MicroBatch, collate
from falcon_qlora.kernels import fp8
from falcon_qlora.methods.lora import Lora
from falcon_qlora.models.activations import set_checkpointing
from falcon_qlora.models.fast_path import (
    apply_fast_path,
    described,
    keep_dequantized_weights,
    keep_fp8_weights,
    remove_fast_path,
)
from falcon_qlora.models.forward import disable_packing, enable_packing
from falcon_qlora.step.loss import sum_of_losses


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings common to all variants.

    Attributes:
        r, alpha: of LoRA on all four linears.
        max_length: positions of a padded document.
        seed: of the adapter.
        max_grad_norm: norm that gradients are clipped to.
        learning_rate: of AdamW.
    """

    r: int = 64
    alpha: float = 16
    max_length: int = 512
    seed: int = 0
    max_grad_norm: float = 0.3
    learning_rate: float = 2e-4


def adapted(base: Any, variant: Variant, settings: Settings) -> Any:
    """Attach LoRA to all linears of `base`, the same for every variant, with B matrices that are not zero."""
    with base.device:  # created on the device: on the CPU it would take seconds in every turn
        method = Lora(r=settings.r, alpha=settings.alpha, dropout=variant.lora_dropout)
        model = method.attach(base, seed=settings.seed)
    generator = torch.Generator(device=base.device).manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01, generator=generator)
    return model


@contextmanager
def build(variant: Variant, base: Any, settings: Settings, kept: dict[str, Any]) -> Iterator[OwnRunner]:
    """Build `variant` on a loaded base model; the base is restored when the block ends.

    Args:
        variant: what to build.
        base: from `load_model` in the variant's quantization, or from its engine's `load`.
        settings: common to all variants.
        kept: the variant's own; empty at first, then the same one at every later build.

    Raises:
        Impossible: if this machine, version or model cannot run it.
    """
    if variant.engine:
        with variant.engine.build(variant, base, settings, kept) as runner:
            yield runner
        return
    if variant.compute_dtype == "fp8" and (reason := fp8.why_not(base.device)):
        raise Impossible(reason)
    model = adapted(base, variant, settings)
    try:
        enable_packing(model)
        notes = []
        if variant.kernels == "auto":
            in_fp8 = variant.compute_dtype == "fp8"
            report = apply_fast_path(model, fp8_products=in_fp8, libraries=variant.libraries)
            if variant.keep:
                keep_fp8_weights(model)
                keep_dequantized_weights(model, sys.maxsize)
            left = [what for what in report.values() if what.startswith("reference")]
            notes += (
                [f"{len(left)} of {len(report)} blocks fall back: {left[0]}"] if left else [described(report)]
            )
        try:
            set_checkpointing(model, [variant.checkpointing] * base.config.num_hidden_layers)
        except ValueError as error:
            raise Impossible(str(error)) from None
        yield OwnRunner(model, variant, settings, notes)
    finally:
        model.gradient_checkpointing_disable()
        remove_fast_path(model)
        disable_packing(model)
        model.unload()


@dataclass
class OwnRunner:
    """This project's step: one micro-batch, packed or padded, as the trainer computes it.

    Attributes:
        notes: for the reader of its row, such as that blocks fell back to the reference path.
    """

    model: Any
    variant: Variant
    settings: Settings
    notes: list[str]

    def __post_init__(self) -> None:
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        on_gpu = self.model.device.type == "cuda"
        self._optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self._parameters, lr=self.settings.learning_rate, weight_decay=0.0, fused=on_gpu
        )
        self.model.train()

    def prepare(self, documents: Sequence[Document]) -> MicroBatch:
        """These documents as one micro-batch on the device, for `step`."""
        pad_to = None
        if self.variant.padding is not None:
            longest = max(len(ids) for ids, _ in documents)
            pad_to = self.settings.max_length if self.variant.padding == "max_length" else longest
        ids, masks = [each[0] for each in documents], [each[1] for each in documents]
        return collate(ids, masks, pad_to=pad_to).to(self.model.device)

    def loss(self, inputs: MicroBatch) -> Tensor:
        with torch.autocast(self.model.device.type, torch.bfloat16):
            return sum_of_losses(self.model, inputs) / len(inputs.targets)

    def step(self, inputs: MicroBatch) -> Tensor:
        """Forward, backward, clipping and the optimizer's step; the mean loss over the target tokens."""
        loss = self.loss(inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()
