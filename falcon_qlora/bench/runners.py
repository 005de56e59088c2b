"""From a variant's name to something that takes training steps, and back to the bare model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.bench.settings import Document, Runner, Settings, adapted
from falcon_qlora.bench.variants import Impossible, Variant
from falcon_qlora.data.packing import MicroBatch, collate
from falcon_qlora.kernels import fp8
from falcon_qlora.models.activations import set_checkpointing
from falcon_qlora.models.fast_path import apply_fast_path, keep_fp8_weights, remove_fast_path
from falcon_qlora.models.forward import disable_packing, enable_packing
from falcon_qlora.step.global_batch import sum_of_losses


@contextmanager
def build(variant: Variant, base: Any, settings: Settings, kept: dict[str, Any]) -> Iterator[Runner]:
    """Make `variant` of a loaded base model; the base is as it was when the block ends.

    Args:
        variant: what to build.
        base: from `load_model` in the variant's quantization (LitGPT: from `litgpt.load`).
        settings: common to all variants.
        kept: the variant's own, empty at first and handed in again whenever it is built again.

    Raises:
        Impossible: if this machine, version or model cannot run it.
    """
    if variant.engine == "litgpt":
        from falcon_qlora.bench.litgpt import LitgptRunner

        yield LitgptRunner(base, variant, settings, kept)
        return
    if variant.engine == "stock":
        from falcon_qlora.bench.stock import stock_runner

        with stock_runner(base, variant, settings, kept) as stock:
            yield stock
        return
    _refuse(variant, base.device)
    model = adapted(base, variant, settings)
    try:
        enable_packing(model)
        notes = []
        if variant.kernels == "auto":
            in_fp8 = variant.compute_dtype == "fp8"
            report = apply_fast_path(model, fp8_products=in_fp8, libraries=variant.libraries)
            if variant.keep_fp8:
                keep_fp8_weights(model)
            left = [what for what in report.values() if what.startswith("reference")]
            notes += (
                [f"{len(left)} of {len(report)} blocks fall back: {left[0]}"]
                if left
                else [*set(report.values())]
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


def _refuse(variant: Variant, device: torch.device) -> None:
    if variant.compute_dtype == "fp8":
        reason = fp8.why_not(device)
        if reason is not None:
            raise Impossible(reason)


@dataclass
class OwnRunner:
    """This project's step: one micro batch, packed or padded, as the trainer computes it."""

    model: Any
    variant: Variant
    settings: Settings
    notes: list[str]
    _parameters: list[Tensor] = field(init=False)
    _optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        on_gpu = self.model.device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=self.settings.learning_rate, weight_decay=0.0, fused=on_gpu
        )
        self.model.train()

    def prepare(self, documents: Sequence[Document]) -> MicroBatch:
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
        loss = self.loss(inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()
