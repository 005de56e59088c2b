"""Model families: one file each, listed in `LAYOUTS`; nothing else names a family's modules."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.models.layouts.base import Layout
from falcon_qlora.models.layouts.falcon import Falcon
from falcon_qlora.models.layouts.falcon_h1 import FalconH1
from falcon_qlora.models.layouts.llama import Llama
from falcon_qlora.models.schemes import scheme_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

LAYOUTS: tuple[type[Layout], ...] = (Falcon, Llama, FalconH1)
_BY_TYPE = {model_type: layout for layout in LAYOUTS for model_type in layout.model_types}
_BY_PRESET = {preset: layout for layout in LAYOUTS for preset in layout.presets}

PRESETS = tuple(_BY_PRESET)
"""Names of the published shapes."""
MODEL_TYPES = tuple(_BY_TYPE)
"""The families' ``model_type`` in configurations."""

_KNOWN_OTHERS = {"falcon_mamba": "a Falcon-Mamba", "mamba": "a Mamba"}


def layout_of(config: PreTrainedConfig) -> Layout:
    """The layout of a model of this configuration."""
    return _BY_TYPE[config.model_type](config)


def layout_of_preset(preset: str) -> type[Layout]:
    """The family of one of `PRESETS`."""
    return _BY_PRESET[preset]


def published_preset(hub_id: str) -> str | None:
    """The preset with the shape of a published model, of whose fine-tunes by the same publisher too."""
    known = {
        hub.lower().removesuffix("-base"): preset
        for each in LAYOUTS
        for preset, hub in each.tokenizers.items()
    }
    name = hub_id.lower()
    name = (
        f"tiiuae/{name.partition('/')[2].removesuffix('-sharded-bf16')}"
        if name.startswith("ybelkada/")
        else name
    )
    return known.get(re.sub(r"-(base|instruct|chat)$", "", name))


def preset_config(preset: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a published model, with single values replaced."""
    layout = layout_of_preset(preset)
    return layout.config_class(**{**layout.presets[preset], **overrides})


def read_config(raw: dict[str, Any], *, source: str = "config.json") -> PreTrainedConfig:
    """Turn a published ``config.json`` into a configuration, old names (RefinedWeb) included.

    Args:
        raw: the parsed file.
        source: where it was read, for messages.

    Raises:
        UserError: if the model is of no family that is trained here, or `Layout.read` refuses it.
    """
    return family_of(raw, source=source).read(raw, source)


def family_of(raw: dict[str, Any], *, source: str) -> type[Layout]:
    """The family of the model that a published ``config.json`` describes.

    Raises:
        UserError: if that family is not trained here, or the checkpoint is quantized by a scheme that is not
            read.
    """
    model_type = raw.get("model_type")
    layout = _BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    what = _KNOWN_OTHERS.get(str(model_type), f"of type {model_type!r}")
    quantized = raw.get("quantization_config")
    if isinstance(quantized, dict) and quantized.get("quant_method") == "bitnet":
        layout, what = None, "a BitNet, as Falcon-E is"
    if layout is None:
        families = "; ".join(f"{each.family} ({each.published})" for each in LAYOUTS)
        raise UserError(
            f"{source}: this model is {what}. falcon_qlora trains {families}, and their fine-tunes"
        )
    scheme_of(raw, source)
    return layout


def causal_lm_in(model: nn.Module) -> PreTrainedModel:
    """The causal language model, of any family, inside whatever wraps it."""
    classes = tuple(layout.model_class for layout in LAYOUTS)
    for module in model.modules():
        if isinstance(module, classes):
            return module
    raise TypeError(f"no model of a known layout in {type(model).__name__}")
