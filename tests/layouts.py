"""Tiny models of every layout, and the model that Transformers itself makes of the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from falcon_qlora.checkpoint import adapter_check
from falcon_qlora.methods.interface import method_of
from falcon_qlora.methods.lora import Lora
from falcon_qlora.models.load import load_model
from falcon_qlora.models.quantize import QuantizeMode, dequantized_weight, is_quantized_linear

VOCABULARY = 128
_SMALL = f"num_hidden_layers=2,vocab_size={VOCABULARY},initializer_range=0.15"
LAYOUTS = {
    "falcon-rw-1b": f"random:falcon-rw-1b?{_SMALL},hidden_size=64,num_attention_heads=4",
    "falcon-7b": f"random:falcon-7b?{_SMALL},hidden_size=192,num_attention_heads=3",
    "falcon-11b": f"random:falcon-11b?{_SMALL},hidden_size=64,num_attention_heads=4,num_kv_heads=2",
    "falcon-40b": f"random:falcon-40b?{_SMALL},hidden_size=64,num_attention_heads=8,num_kv_heads=2",
    "falcon-180b": f"random:falcon-180b?{_SMALL},hidden_size=192,num_attention_heads=6,num_kv_heads=2",
}
# Half of the heads share keys, and a head is not hidden / heads, as in no other.
_FALCON3 = "hidden_size=64,intermediate_size=128,num_attention_heads=4,num_key_value_heads=2,head_dim=32"
FAMILIES = {**LAYOUTS, "falcon3": f"random:falcon3-1b?{_SMALL},{_FALCON3}"}
# Heads as Falcon3's own, for what depends on their size.
WIDE_HEADS = {"falcon3-256": FAMILIES["falcon3"].replace("head_dim=32", "head_dim=256")}
# For tests of fast blocks; those of its reference path are in test_falcon_h1. Two groups, a gated norm, and
# rows of in_proj's output that no multiple of eight divides.
_FALCON_H1 = (
    "hidden_size=64,intermediate_size=128,num_attention_heads=4,num_key_value_heads=2,head_dim=32,"
    "mamba_d_ssm=128,mamba_n_heads=4,mamba_d_head=32,mamba_d_state=16,mamba_n_groups=2,"
    "embedding_multiplier=3.0,lm_head_multiplier=0.4,key_multiplier=0.7,attention_in_multiplier=1.3,"
    "attention_out_multiplier=0.8,ssm_in_multiplier=1.25,ssm_out_multiplier=0.9"
)
_H1_WIDE = "hidden_size=64,intermediate_size=128,num_attention_heads=2,mamba_d_ssm=256,mamba_n_heads=2"
FALCON_H1 = {
    "falcon-h1": f"random:falcon-h1-7b?{_SMALL},{_FALCON_H1}",
    "falcon-h1-128": f"random:falcon-h1-7b?{_SMALL},{_H1_WIDE}",  # heads as 7B's own
}
UNTIED = ("falcon-11b", "falcon3")  # layouts whose head is not the embedding
MODES: tuple[QuantizeMode, ...] = ("4bit", "8bit", "16bit")


def tiny_model(
    layout: str, mode: QuantizeMode = "16bit", device: str = "cpu", compute_dtype: str = "auto"
) -> PreTrainedModel:
    name = (FAMILIES | WIDE_HEADS | FALCON_H1)[layout]
    return load_model(name, quantize_mode=mode, device=device, compute_dtype=compute_dtype, seed=1)


def vary_norms(model: nn.Module) -> None:
    """Give the norms weights, and biases, that differ: as they are made they are all alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("norm" in name or "ln_" in name):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) / 4)


def attach_lora(model: PreTrainedModel, *, seed: int = 0, **settings: Any) -> Any:
    """`Lora` with these settings, whose names may come as lists, on a loaded model."""
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return Lora(**plain).attach(model, seed=seed)


def check_adapter(folder: Path, model: nn.Module, *, trained: bool | None = None) -> None:
    """All that a run checks of a folder that was saved from `model`."""
    adapter_check.check_tensors(folder, model, trained=trained)
    if method_of(model).opened_by == "peft":
        adapter_check.check_reading(folder, model)
    adapter_check.check_opening(folder, model)


def trainable_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def plain_float32(model: PreTrainedModel, device: str | torch.device = "cpu") -> PreTrainedModel:
    """Transformers' own float32 model with the weights that `model` stands for, on `device`."""
    config = copy.deepcopy(model.config)
    config.dtype = torch.float32
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device(device), no_init_weights():  # all of them are copied
        plain = type(model)(config).float().eval()
    plain.tie_weights()
    quantized = {
        f"{name}.weight": dequantized_weight(module).to(device, torch.float32)
        for name, module in model.named_modules()
        if is_quantized_linear(module)
    }
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(quantized.get(name, ours[name]))
    return plain


def documents(lengths: list[int], *, seed: int = 0, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).to(device) for n in lengths]
