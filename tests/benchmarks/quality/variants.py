"""What is compared: the variants of the fast path, the stock path, and the float32 truth about both."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from falcon_qlora.kernels import fp8
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.load import load_model
from falcon_qlora.models.quantize import QuantizeMode, dequantized_weight, is_quantized_linear
from tests.layouts import attach_lora, plain_float32

PathName = Literal["stock", "fast"]
R, ALPHA = 16, 32


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the fast path.

    Attributes:
        name: in the report and on the command line.
        quantize_mode: how the frozen linears are stored.
        compute_dtype: of their products.
        loss_tolerance: how far the evaluation loss may be from the stock path's, as a fraction.
        on_by_default: whether users get it unasked: if so, its failure is the gate's.
    """

    name: str
    quantize_mode: QuantizeMode
    compute_dtype: Literal["bf16", "fp32", "fp8"] = "bf16"
    loss_tolerance: float = 0.001
    on_by_default: bool = True


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(name="4bit", quantize_mode="4bit"),
        Variant(name="8bit", quantize_mode="8bit", loss_tolerance=0.003),
        Variant(name="16bit", quantize_mode="16bit"),
        Variant(
            name="4bit-fp8",
            quantize_mode="4bit",
            compute_dtype="fp8",
            loss_tolerance=0.003,
            on_by_default=False,
        ),
        Variant(name="4bit-fp32", quantize_mode="4bit", compute_dtype="fp32"),
    )
}


class NotBuilt(Exception):
    """A variant that this code or this machine does not have; the message is the reason."""


def build(
    variant: Variant, model_name: str, device: torch.device, path: PathName, *, seed: int = 0
) -> PeftModel:
    """Load a base and put LoRA on all its linears, on one of the two paths.

    The stock path is PEFT's and bitsandbytes' modules; it computes in bfloat16 where the variant's dtype is
    FP8.

    Raises:
        NotBuilt: if the fast path does not do what the variant asks for.
    """
    in_fp8 = path == "fast" and variant.compute_dtype == "fp8"
    reason = fp8.why_not(device) if in_fp8 else None
    if reason is not None:
        raise NotBuilt(reason)
    base = _base(variant, model_name, device)
    model = attach_lora(base, r=R, alpha=ALPHA, seed=seed)
    enable_packing(model)
    if path == "fast":
        left = [
            line
            for line in apply_fast_path(model, fp8_products=in_fp8).values()
            if not line.startswith("fast")
        ]
        if left:
            raise NotBuilt(f"{len(left)} blocks do not take the fast path: {left[0]}")
    return model


def stock_on_dequantized_weights(variant: Variant, model_name: str, device: torch.device) -> PeftModel:
    """The stock path in bfloat16 on plain linears that hold the weights which `variant`'s base stands for."""
    base = _base(variant, model_name, device)
    plain = load_model(model_name, quantize_mode="16bit", device=device, compute_dtype="bf16", seed=1)
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, module in base.named_modules():
            if is_quantized_linear(module):
                parameters[f"{name}.weight"].copy_(dequantized_weight(module))
    model = attach_lora(plain, r=R, alpha=ALPHA)
    enable_packing(model)
    return model


def exact(variant: Variant, model_name: str, device: torch.device) -> PeftModel:
    """Transformers' own model in float32 on the weights that `variant`'s base stands for, with LoRA."""
    return attach_lora(plain_float32(_base(variant, model_name, device), device), r=R, alpha=ALPHA)


def _base(variant: Variant, model_name: str, device: torch.device) -> PreTrainedModel:
    dtype = "fp32" if variant.compute_dtype == "fp32" else "bf16"
    return load_model(
        model_name, quantize_mode=variant.quantize_mode, device=device, compute_dtype=dtype, seed=1
    )


def copy_adapter(source: PeftModel, target: PeftModel) -> None:
    trained = {name: p for name, p in source.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "lora_" in name:
                parameter.copy_(trained[name])


def fill_adapter(model: PeftModel, std: float, seed: int = 0) -> None:
    """Make every B random, so that all of LoRA matters; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def autocast(variant: Variant, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=variant.compute_dtype != "fp32")
