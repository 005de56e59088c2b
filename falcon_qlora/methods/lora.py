"""LoRA, PEFT's own, on a quantized base: float32 adapters that plain PEFT opens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.methods.folder import TENSORS
from falcon_qlora.methods.interface import ParameterGroup, remember
from falcon_qlora.methods.slices import SLICES, SlicedUp, slice_rows
from falcon_qlora.models.layouts import LAYOUTS, layout_of
from falcon_qlora.models.load import quantization_of
from falcon_qlora.processes import devices

# After bitsandbytes, see models/quantize.py.
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict  # isort: skip


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Train two low-rank matrices on each of some linears.

    Args: those of `attach_lora`.

    Raises:
        UserError: for targets or slices that no model has, or that do not go together.
    """

    r: int = 64
    alpha: float = 16
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    slices: tuple[str, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    trains_in_float32: ClassVar[bool] = True
    why_not_merged: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        checked_targets(self.target_modules, self.slices)
        if self.slices and (self.use_rslora or self.use_dora):
            raise UserError("--lora_slices goes with neither --use_rslora nor --use_dora")

    def describe(self) -> str:
        where = f" on {', '.join(self.slices)}" if self.slices else ""
        return f"LoRA r {self.r}, alpha {self.alpha:g}, dropout {self.dropout:g}{where}"

    def parameter_groups(self, config: PreTrainedConfig) -> list[ParameterGroup]:
        targets, layout = self.targets(config), layout_of(config)
        if self.slices:
            return _slice_groups(config, checked_slices(self.slices), self.r)
        shapes = layout.linear_shapes()
        groups = [
            ParameterGroup(
                kind=f"LoRA on {name}", count=layout.lora_parameter_count(r=self.r, target_modules=[name])
            )
            for name in targets
        ]
        if self.use_dora:
            magnitudes = config.num_hidden_layers * sum(shapes[name][0] for name in targets)
            groups.append(ParameterGroup(kind="DoRA magnitudes", count=magnitudes))
        return groups

    def targets(self, config: PreTrainedConfig) -> list[str]:
        """The linears of a model of `config` that are adapted, see `checked_targets`."""
        return checked_targets(self.target_modules, self.slices, config)

    @property
    def saved_rank(self) -> int:
        """Rank of the matrices as PEFT has them: slices of rank r are one adapter of their joint rank."""
        return self.r * (len(self.slices or ()) or 1)

    def peft_config(self, target_modules: list[str], **other: Any) -> LoraConfig:
        """These settings on linears of these names, and `other`, as PEFT takes them."""
        settings = {
            "r": self.saved_rank,
            # So that the scale of slices too is alpha / r.
            "lora_alpha": self.alpha * (self.saved_rank // self.r),
            "lora_dropout": self.dropout,
            "bias": "none",
            "target_modules": target_modules,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "task_type": "CAUSAL_LM",
        }
        return LoraConfig(**settings | other)

    def saved_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        """Name in the file → shape, of every tensor of a saved adapter of a model of `config`."""
        shapes: dict[str, tuple[int, ...]] = {}
        layout = layout_of(config)
        linears = layout.linear_shapes()
        for module in layout.linears_of(self.targets(config)):
            out, into = linears[module.rpartition(".")[2]]
            prefix = f"base_model.model.{module}.lora_"
            shapes[f"{prefix}A.weight"] = (self.saved_rank, into)
            shapes[f"{prefix}B.weight"] = (out, self.saved_rank)
            if self.use_dora:
                shapes[f"{prefix}magnitude_vector"] = (out,)
        return shapes

    def attach(self, model: PreTrainedModel, *, seed: int = 0) -> PeftModel:
        return attach_lora(
            model,
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            slices=self.slices,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            seed=seed,
        )

    def save(self, model: PeftModel, folder: Path) -> None:
        # Not the embeddings, which are never trained: PEFT would ask the hub whether they were.
        model.save_pretrained(folder, save_embedding_layers=False)

    def restore(self, model: PeftModel, folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        for name in sorted(tensors.keys() ^ self.saved_shapes(model.config).keys()):
            raise RuntimeError(f"{folder} does not fit this model: {name} is in one of them only")
        set_peft_model_state_dict(model, tensors)

    def disabled(self, model: PeftModel) -> AbstractContextManager[None]:
        return model.disable_adapter()


def attach_lora(
    model: PreTrainedModel,
    *,
    r: int = 64,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    slices: Sequence[str] | None = None,
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
        target_modules: of the blocks' linears, by the last part of their name; all where None.
        slices: of ``query``, ``key``, ``value``: train rank `r` on each of these slices of the projection
            that is all three, and nothing else.
        use_rslora: scale by the root of the rank.
        use_dora: train magnitudes and directions apart.
        seed: of the random matrices, the same on every process.

    Returns:
        The model inside PEFT's wrapper, in training mode.

    Raises:
        UserError: for targets or slices that the model does not have, or that do not go together.
    """
    method = Lora(
        r=r,
        alpha=alpha,
        dropout=dropout,
        target_modules=tuple(target_modules) if target_modules else None,
        slices=checked_slices(slices) if slices else None,
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    with _told_quantized(model), devices.draws_undone(model.device):
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, method.peft_config(method.targets(model.config)))
    if method.slices:
        _train_slices(peft_model, method.slices, r)
    _train_in_float32(peft_model)
    remember(peft_model, method)
    return peft_model.train()


def open_lora(model: PreTrainedModel, folder: Path, method: Lora, *, trainable: bool) -> PeftModel:
    """Put a saved adapter on its base.

    Args:
        model: from `load_model`.
        folder: the adapter's, checked.
        method: with the settings that were read of it: its file's own do not reach PEFT.
        trainable: to train on; else for inference.

    Raises:
        UserError: if weights were trained outside the slices that the adapter is said to be of.
    """
    targets = method.targets(model.config)
    config = method.peft_config(targets, base_model_name_or_path=model.name_or_path)
    with _told_quantized(model):
        peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
    if method.slices and trainable:
        _train_slices(peft_model, method.slices, method.r)
        try:
            method.restore(peft_model, folder)
        except RuntimeError as error:
            raise UserError(f"{folder}: {error}") from None
    _train_in_float32(peft_model)
    remember(peft_model, method)
    return peft_model.train(trainable)


def checked_targets(
    target_modules: Sequence[str] | None,
    slices: Sequence[str] | None = None,
    config: PreTrainedConfig | None = None,
) -> list[str]:
    """The linears that `target_modules` names, by the last part of their name; all of them for None.

    Args:
        target_modules, slices: as for `attach_lora`.
        config: of the model; None takes what the blocks of any family have.

    Raises:
        UserError: for a name that the blocks do not have, or another than that of the sliced projection.
    """
    layouts = LAYOUTS if config is None else (type(layout_of(config)),)
    if slices:
        fused = [layout.fused for layout in layouts if layout.fused]
        if not fused:
            raise UserError(
                f"--lora_slices trains slices of a projection that is queries, keys and values at once, and "
                f"{layouts[0].family} has three: name those that are meant as --lora_target_modules"
            )
        if target_modules and (len(target_modules) > 1 or target_modules[0] not in fused):
            raise UserError(
                f"--lora_slices trains slices of {fused[0]} alone: leave out --lora_target_modules"
            )
        return fused
    linears = [name for layout in layouts for name in layout.linears]
    if not target_modules or list(target_modules) == ["all-linear"]:
        return linears
    for name in target_modules:
        if name not in linears:
            there = "; ".join(f"{layout.family}'s: {', '.join(layout.linears)}" for layout in layouts)
            raise UserError(
                f"lora_target_modules: the blocks have no linear {name!r}{nearest(name, linears)}. {there}."
            )
    return list(target_modules)


def checked_slices(slices: Sequence[str]) -> tuple[str, ...]:
    """The slices by their names, in the projection's own order.

    Raises:
        UserError: for a name that is none.
    """
    for name in slices:
        if name not in SLICES:
            raise UserError(f"lora_slices: {name!r} is not one of {', '.join(SLICES)}{nearest(name, SLICES)}")
    return tuple(name for name in SLICES if name in slices)


def _slice_groups(config: PreTrainedConfig, slices: tuple[str, ...], r: int) -> list[ParameterGroup]:
    layout = layout_of(config)
    assert layout.fused is not None
    fused, hidden = layout.linear_shapes()[layout.fused]
    rows = {"query": hidden, "key": (fused - hidden) // 2, "value": (fused - hidden) // 2}
    blocks = config.num_hidden_layers
    return [
        ParameterGroup(kind=f"LoRA on {name}", count=blocks * r * (hidden + rows[name])) for name in slices
    ]


def _train_slices(peft_model: PeftModel, slices: tuple[str, ...], r: int) -> None:
    """Replace the second matrices by their blocks for `slices`."""
    layout = layout_of(peft_model.config)
    assert layout.fused is not None
    for attention in peft_model.modules():
        if isinstance(attention, layout.attention_class):
            layer = getattr(attention, layout.fused)
            rows = slice_rows(layout, attention, layer)
            layer.lora_B["default"] = SlicedUp({name: rows[name] for name in slices}, layer.out_features, r)


@contextmanager
def _told_quantized(model: PreTrainedModel) -> Iterator[None]:
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
