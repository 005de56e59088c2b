"""PEFT's layers on a loaded model, and LoRA on slices of a fused projection.

To PEFT the slices are one adapter. Rank r on each of n slices is rank ``n * r`` on the whole projection,
whose second matrix is zero except for the rows of slice i in the columns ``i * r`` to ``(i + 1) * r``. Only
those blocks are parameters. The whole matrix is saved, so plain PEFT opens it like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from falcon_qlora.common.errors import UserError
from falcon_qlora.methods.adapter_folder import tensors_file
from falcon_qlora.methods.interface import remember
from falcon_qlora.methods.lora import SLICES, Lora
from falcon_qlora.models.forward import replace_forward
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.layouts.base import Layout
from falcon_qlora.models.load import quantization_of
from falcon_qlora.models.tensor_files import read_tensor
from falcon_qlora.models.token_rows import forward_of, grow_vocabulary, modules_with_rows, start_at_the_mean
from falcon_qlora.models.undrawn import DrawnOnHost
from falcon_qlora.processes import devices


class SlicedUp(nn.Module):
    """The second matrix of such an adapter, in place of PEFT's ``nn.Linear``.

    Args:
        rows: slice's name → the projection's outputs that belong to it, int64.
        out_features: of the whole projection.
        r: rank of each slice.

    Attributes:
        query, key, value: blocks of the trained slices: float32 ``[rows, r]``, zero at the start.
    """

    bias = None

    def __init__(self, rows: dict[str, Tensor], out_features: int, r: int):
        super().__init__()
        self.in_features, self.out_features, self.r = r * len(rows), out_features, r
        self._slices = tuple(rows)
        for name, of_slice in rows.items():
            start = torch.zeros(len(of_slice), r, device=of_slice.device)
            self.register_parameter(name, nn.Parameter(start))
            self.register_buffer(f"_rows_of_{name}", of_slice, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The whole matrix ``[out_features, n * r]``."""
        whole = getattr(self, self._slices[0]).new_zeros(self.out_features, self.in_features)
        for place, name in enumerate(self._slices):
            sides = (place * self.r, (len(self._slices) - 1 - place) * self.r)
            whole = whole.index_copy(0, getattr(self, f"_rows_of_{name}"), F.pad(getattr(self, name), sides))
        return whole

    def forward(self, low: Tensor) -> Tensor:
        return F.linear(low, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if f"{prefix}weight" not in state_dict:
            return
        whole = state_dict[f"{prefix}weight"]
        with torch.no_grad():
            for place, name in enumerate(self._slices):
                rows = whole[getattr(self, f"_rows_of_{name}").to(whole.device)]
                getattr(self, name).copy_(rows[:, place * self.r : (place + 1) * self.r])
        if not torch.equal(self.weight.to(whole), whole):
            raise RuntimeError(f"{prefix}weight is trained outside the slices {', '.join(self._slices)}")


def slice_rows(layout: Layout, attention: Any, linear: Any) -> dict[str, Tensor]:
    """Which outputs of an attention's fused projection are queries, keys and values: int64 each, in order."""
    places = torch.arange(linear.out_features, device=linear.weight.device)
    heads = layout.split(attention, places[None])
    return {name: each.flatten() for name, each in zip(SLICES, heads, strict=True)}


def add_lora(model: PreTrainedModel, method: Lora, *, seed: int) -> PeftModel:
    """Add trainable low-rank matrices to a loaded model, in float32, and freeze the rest.

    Args:
        model: from `load_model`.
        method: what is added.
        seed: of the random matrices, the same on every process.

    Returns:
        The model inside PEFT's wrapper, in training mode.
    """
    vocabulary, rows = model.config.vocab_size, method.rows_for_peft(model.config)
    config = method.peft_config(method.targets(model.config), **rows)
    grow_vocabulary(model, method.vocab_size(model.config))
    with (
        _told_quantized(model),
        past_pefts_refusal(model),
        devices.draws_undone(model.device),
        torch.device(model.device),
        DrawnOnHost(),
    ):
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
    _train_slices(peft_model, method)
    peft_model = _finished(peft_model, method)
    start_at_the_mean(peft_model, vocabulary)
    return peft_model


def open_lora(model: PreTrainedModel, folder: Path, method: Lora, *, trainable: bool) -> PeftModel:
    """Put a saved adapter on its base.

    Args:
        model: from `load_model`.
        folder: the adapter's, checked.
        method: with the settings read from its files, which do not reach PEFT themselves.
        trainable: whether to continue training; else for inference.

    Raises:
        UserError: if weights were trained outside the slices that its record names.
    """
    targets, rows = method.targets(model.config), method.rows_for_peft(model.config)
    grow_vocabulary(model, method.vocab_size(model.config))
    config = method.peft_config(targets, base_model_name_or_path=model.name_or_path, **rows)
    with _told_quantized(model), past_pefts_refusal(model):
        peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
    if method.slices and trainable:
        _train_slices(peft_model, method)
        try:
            method.restore(peft_model, folder)
        except RuntimeError as error:
            raise UserError(f"{folder}: {error}") from None
    return _finished(peft_model, method).train(trainable)


@torch.no_grad()
def merged_weight(method: Lora, weight: Tensor, module: str, folder: Path) -> Tensor:
    """Merge this one linear by PEFT's own function: float32 ``[out, in]``."""
    out, into = weight.shape
    with torch.device("meta"):
        holder = nn.ModuleDict({"linear": nn.Linear(into, out, bias=False)})
    holder["linear"].weight = nn.Parameter(weight, requires_grad=False)
    config = method.peft_config(["linear"], lora_dropout=0.0, init_lora_weights=False)
    inject_adapter_in_model(config, holder)
    layer: Any = holder["linear"]
    parts = {"lora_A": ".weight", "lora_B": ".weight"}
    if method.use_dora:
        parts["lora_magnitude_vector"] = ""
    for name, end in parts.items():
        tensor = read_tensor(tensors_file(folder), f"base_model.model.{module}.{name}{end}").float()
        part = getattr(layer, name)["default"]
        part.weight = nn.Parameter(tensor.to(weight.device), requires_grad=False)
    layer.merge(safe_merge=True)
    merged: Tensor = layer.get_base_layer().weight.data
    return merged


def _train_slices(peft_model: PeftModel, method: Lora) -> None:
    """Replace the second matrices by their blocks for the method's slices, where it has some."""
    layout = layout_of(peft_model.config)
    for attention in peft_model.modules():
        if method.slices and layout.fused and isinstance(attention, layout.attention_class):
            layer = getattr(attention, layout.fused)
            rows = slice_rows(layout, attention, layer)
            blocks = {name: rows[name] for name in method.slices}
            layer.lora_B["default"] = SlicedUp(blocks, layer.out_features, method.r)


@contextmanager
def _told_quantized(model: PreTrainedModel) -> Iterator[None]:
    """Tell PEFT, and only PEFT, that the model is quantized.

    PEFT chooses its layers for bitsandbytes by these attributes. If TRL saw them later, it would cast every
    trainable parameter to bfloat16, in which small updates are lost.
    """
    told = {"4bit": "is_loaded_in_4bit", "8bit": "is_loaded_in_8bit"}.get(quantization_of(model))
    if told is not None:
        setattr(model, told, True)
    try:
        yield
    finally:
        if told is not None:
            delattr(model, told)


@contextmanager
def past_pefts_refusal(model: PreTrainedModel) -> Iterator[None]:
    """Let PEFT put LoRA on linears that it refuses by model type: here they always run as modules."""
    if not layout_of(model.config).not_for_peft:
        yield
        return
    model.config.model_type = ""
    try:
        yield
    finally:
        del model.config.model_type  # the class attribute is left


def _finished(peft_model: PeftModel, method: Lora) -> PeftModel:
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in modules_with_rows(peft_model):
        replace_forward(module, forward_of(module))
    remember(peft_model, method)
    return peft_model.train()
