"""What all variants of a training step have in common: settings, documents, the adapter, how they are run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from falcon_qlora.bench.variants import Variant
from falcon_qlora.methods.lora import attach_lora

Document = tuple[Any, Any]
"""Token ids ``[length]`` and, of the same length, 1 where a token is a target."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every variant has in common.

    Attributes:
        r, alpha: of LoRA on all four linears.
        max_length: positions of a padded document.
        seed: of the adapter.
        max_grad_norm: gradients are clipped to it; the first reference's.
        learning_rate: of AdamW.
    """

    r: int = 64
    alpha: float = 16
    max_length: int = 512
    seed: int = 0
    max_grad_norm: float = 0.3
    learning_rate: float = 2e-4


class Runner(Protocol):
    """A model that is ready to train.

    Attributes:
        notes: what a reader of its row should know, such as that it fell back.
    """

    notes: list[str]

    def prepare(self, documents: Sequence[Document]) -> Any:
        """One micro batch of these documents, on the device, as `step` takes it."""
        ...

    def step(self, inputs: Any) -> Tensor:
        """Forward, backward, clipping and the optimizer's step; the mean loss over the target tokens."""
        ...


def adapted(base: Any, variant: Variant, settings: Settings) -> Any:
    """LoRA on all linears of `base`, whose second matrices are not zero, the same for every variant."""
    with base.device:  # made where they will be: on the CPU it takes seconds, and every turn does it again
        model = attach_lora(
            base, r=settings.r, alpha=settings.alpha, dropout=variant.lora_dropout, seed=settings.seed
        )
    generator = torch.Generator(device=base.device).manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01, generator=generator)
    return model


def is_installed(package: str) -> bool:
    """Whether `package` can be imported."""
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True
