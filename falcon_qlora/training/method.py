"""The method that a configuration names, with its settings."""

from __future__ import annotations

from falcon_qlora.config import Configuration
from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.adapter_v2 import AdapterV2
from falcon_qlora.methods.full import Full
from falcon_qlora.methods.interface import Method
from falcon_qlora.methods.lora import Lora


def configured_method(configuration: Configuration) -> Method:
    """What is trained, and how."""
    method, lora = configuration.method, configuration.lora
    if method.method == "full":
        return Full()
    if method.method == "lora":
        return Lora(
            r=lora.lora_r,
            alpha=lora.lora_alpha,
            dropout=lora.lora_dropout,
            target_modules=tuple(lora.lora_target_modules) if lora.lora_target_modules else None,
            slices=tuple(lora.lora_slices) if lora.lora_slices else None,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
        )
    prefix = {"prefix_length": method.adapter_prefix_length, "first_block": method.adapter_first_block}
    return Adapter(**prefix) if method.method == "adapter" else AdapterV2(**prefix)
