"""LoRA, PEFT's own, on a quantized Falcon: float32 adapters that plain PEFT opens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import FalconForCausalLM

from falcon_qlora.errors import UserError, nearest
from falcon_qlora.methods.saved import SavedAdapter, adapter_settings, read_adapter
from falcon_qlora.models.falcon import LINEARS
from falcon_qlora.models.load import load_model, quantization_of
from falcon_qlora.models.quantize import QuantizeMode

from peft import LoraConfig, PeftModel, get_peft_model  # isort: skip  # after bitsandbytes, see models/quantize.py


def attach_lora(
    model: FalconForCausalLM,
    *,
    r: int = 64,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: list[str] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    seed: int = 0,
) -> PeftModel:
    """Add trainable low-rank matrices to a loaded model, in float32, and freeze the rest.

    Args:
        model: from `load_model`.
        r: rank.
        alpha: the product is scaled by alpha / r, or alpha / sqrt(r) with rsLoRA.
        dropout: probability of dropping an input of the low-rank product.
        target_modules: of ``query_key_value``, ``dense``, ``dense_h_to_4h``, ``dense_4h_to_h``; all where
            None.
        use_rslora: scale by the root of the rank.
        use_dora: train magnitudes and directions apart.
        seed: of the random matrices, the same on every process.

    Returns:
        The model inside PEFT's wrapper, in training mode.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        bias="none",
        target_modules=checked_targets(target_modules),
        use_rslora=use_rslora,
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with _told_quantized(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
    _train_in_float32(peft_model)
    return peft_model.train()


def load_adapter(
    path: str | Path,
    *,
    base_model: FalconForCausalLM | str | None = None,
    quantize_mode: QuantizeMode = "4bit",
    device: torch.device | str | None = None,
    compute_dtype: torch.dtype | str = "auto",
    double_quantization: bool = True,
    revision: str | None = None,
    trainable: bool = False,
) -> PeftModel:
    """Open a saved adapter on its base model, which is loaded quantized.

    Args:
        path: the adapter's folder.
        base_model: a loaded model, or the name of one; the one that the adapter names where None.
        quantize_mode: how to load the base, see `load_model`; so too the next four.
        device: where to load it.
        compute_dtype: its compute dtype.
        double_quantization: whether NF4's scales are quantized too.
        revision: of a base on the hub.
        trainable: to train on; else for inference.

    Raises:
        UserError: if the folder holds no adapter or a damaged one, or names a base that cannot be loaded.
    """
    path = Path(path)
    settings = adapter_settings(path)
    if base_model is None:
        base_model = settings.get("base_model_name_or_path")
        if not base_model:
            raise UserError(
                f"{path}/adapter_config.json names no base model. Name it with --model_name_or_path."
            )
    saved = read_adapter(path)
    if isinstance(base_model, str):
        base_model = load_model(
            base_model,
            quantize_mode=quantize_mode,
            device=device,
            compute_dtype=compute_dtype,
            double_quantization=double_quantization,
            revision=revision,
        )
    assert not isinstance(base_model, str)
    saved.check(base_model.config)
    with _told_quantized(base_model):
        # Not the file's own settings: only what was read of them reaches PEFT.
        peft_model = PeftModel.from_pretrained(
            base_model, str(path), is_trainable=trainable, config=_peft_config(saved)
        )
    _train_in_float32(peft_model)
    return peft_model.train(trainable)


def _peft_config(saved: SavedAdapter) -> LoraConfig:
    return LoraConfig(
        r=saved.r,
        lora_alpha=saved.alpha,  # type: ignore[arg-type]
        lora_dropout=saved.dropout,
        target_modules=list(saved.targets),
        use_rslora=saved.use_rslora,
        use_dora=saved.use_dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=saved.base_model,
        revision=saved.revision,
    )


def checked_targets(target_modules: list[str] | None) -> list[str]:
    """The linears that `target_modules` names, by the last part of their name; all four for None.

    Raises:
        UserError: for a name that Falcon's blocks do not have.
    """
    if not target_modules or target_modules == ["all-linear"]:
        return list(LINEARS)
    for name in target_modules:
        if name not in LINEARS:
            raise UserError(
                f"lora_target_modules: Falcon's blocks have no linear {name!r}{nearest(name, LINEARS)}. "
                f"They have {', '.join(LINEARS)}."
            )
    return list(target_modules)


@contextmanager
def _told_quantized(model: FalconForCausalLM) -> Iterator[None]:
    """Say to PEFT, and to it alone, that the model is quantized.

    PEFT chooses its layers for bitsandbytes by these attributes. TRL, where it sees them later, casts every
    trainable parameter to bfloat16, in which small updates are lost.
    """
    mode = quantization_of(model)
    told: dict[str, Any] = {"4bit": {"is_loaded_in_4bit": True}, "8bit": {"is_loaded_in_8bit": True}}.get(
        mode, {}
    )
    for name, value in told.items():
        setattr(model, name, value)
    try:
        yield
    finally:
        for name in told:
            delattr(model, name)


def _train_in_float32(peft_model: PeftModel) -> None:
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
