"""What a quantized checkpoint decides: how the base is stored, and which methods cannot train it."""

from __future__ import annotations

from falcon_qlora.common.errors import UserError
from falcon_qlora.config.parser import Layer
from falcon_qlora.config.settle import Laid
from falcon_qlora.methods.interface import Method
from falcon_qlora.methods.table import METHODS
from falcon_qlora.models.fingerprint import folder_here
from falcon_qlora.models.schemes import Scheme, scheme_in


def _rank(laid: Laid, name: str) -> int:
    return laid[name][1].rank if name in laid else 0


def follow_checkpoint(laid: Laid) -> None:
    """Lay down how a quantized checkpoint is stored, where the model that is named is one on this machine.

    A layer below the one that names the model gives way.

    Raises:
        UserError: if a setting asks for another storage, or the method for none.
    """
    if _rank(laid, "model_name_or_path") < 1:
        return
    name, layer = laid["model_name_or_path"]
    revision = laid["model_revision"][0] if "model_revision" in laid else None
    scheme = scheme_in(folder_here(str(name), revision=revision))
    if scheme is None:
        return
    asked = {
        setting: laid[setting][0]
        for setting in ("quantize_mode", "double_quantization")
        if _rank(laid, setting) >= layer.rank
    }
    scheme.refuse_others(name, asked.get("quantize_mode"), asked.get("double_quantization"))
    refuse_needing_16bit(METHODS[laid["method"][0]] if "method" in laid else METHODS["lora"], scheme, name)
    follows = Layer(origin="its config.json", values={}, rank=layer.rank)
    laid["quantize_mode"] = scheme.mode, follows
    if scheme.mode == "4bit":
        laid["double_quantization"] = scheme.double_quantization, follows
    elif "double_quantization" in laid and _rank(laid, "double_quantization") < layer.rank:
        del laid["double_quantization"]


def refuse_needing_16bit(method: type[Method] | Method, scheme: Scheme, name: str) -> None:
    """Refuse a method that needs a 16-bit base for the quantized checkpoint `name`."""
    if method.needs_16bit:
        raise UserError(
            f"--method {method.name} {method.needs_16bit}, and {name} is a quantized checkpoint "
            f"({scheme.words}): name the model that it was made of"
        )
