"""How a checkpoint's linears are stored, as ``quantization_config`` in its ``config.json`` says.

bitsandbytes' NF4 and LLM.int8() are read; any other scheme is refused by name. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.untrusted import read_json

QuantizeMode = Literal["4bit", "8bit", "16bit"]

NF4_BLOCK = 64  # weights that share one scale
NF4_NESTED_BLOCK = 256  # scales that share one scale, under double quantization
_KEY = "quantization_config"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How every linear of a checkpoint's blocks is stored.

    Attributes:
        mode: ``4bit`` or ``8bit``.
        double_quantization: whether NF4's scales are quantized too.
    """

    mode: QuantizeMode
    double_quantization: bool = True

    @property
    def words(self) -> str:
        """The storage in words."""
        if self.mode == "8bit":
            return "8bit"
        return f"4bit with{'' if self.double_quantization else 'out'} double quantization"

    def refuse_others(self, name: str, mode: str | None, double_quantization: bool | None) -> None:
        """Refuse to read the checkpoint as if it were stored in another way; None asks for nothing.

        Args:
            name: of the checkpoint.
            mode, double_quantization: what is asked for.

        Raises:
            UserError: if that contradicts how it is stored.
        """
        asked = [f"-q {mode}"] if mode not in (None, self.mode) else []
        if self.mode == "4bit" and double_quantization not in (None, self.double_quantization):
            asked.append(f"--double_quantization {str(double_quantization).lower()}")
        if asked:
            raise UserError(
                f"{name} is a quantized checkpoint ({self.words}), which cannot be loaded with "
                f"{' '.join(asked)}: leave that out, or name the model that it was made of"
            )


def scheme_of(raw: dict[str, Any], source: str) -> Scheme | None:
    """The scheme that a ``config.json`` declares; None if the checkpoint is not quantized.

    Args:
        raw: the parsed file.
        source: where it was read, for messages.

    Raises:
        UserError: for a scheme that is not read here, naming it.
    """
    declared = raw.get(_KEY)
    if declared is None:
        return None
    if not isinstance(declared, dict):
        raise UserError(f"{source}: {_KEY} is {str(declared)[:40]!r}; expected a scheme's settings")
    eight, four = (declared.get(f"load_in_{bits}") is True for bits in ("8bit", "4bit"))
    # Files from before Transformers 4.35 have no `quant_method`.
    method = declared.get("quant_method", "bitsandbytes" if eight or four else None)
    what = None
    if method != "bitsandbytes":
        what = f"quantized by {_shown(method)}"
    elif eight == four:
        what = "quantized by bitsandbytes in neither 4 nor 8 bits"
    elif eight and declared.get("llm_int8_has_fp16_weight"):
        what = "in 8 bits with weights kept in fp16 (llm_int8_has_fp16_weight)"
    elif four and declared.get("bnb_4bit_quant_type", "fp4") != "nf4":
        what = f"quantized in 4 bits of type {_shown(declared.get('bnb_4bit_quant_type', 'fp4'))}"
    elif four and declared.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        what = f"NF4 packed into {_shown(declared['bnb_4bit_quant_storage'])}"
    elif four and declared.get("bnb_4bit_blocksize", NF4_BLOCK) != NF4_BLOCK:
        what = f"NF4 in blocks of {_shown(declared['bnb_4bit_blocksize'])}"
    if what is not None:
        raise UserError(
            f"{source}: the checkpoint is {what}, which is not read: only bitsandbytes' NF4 (blocks of "
            f"{NF4_BLOCK}, uint8) and LLM.int8() are. Name the model that it was made of; -q quantizes it"
        )
    return Scheme(
        mode="8bit" if eight else "4bit",
        double_quantization=eight or declared.get("bnb_4bit_use_double_quant") is True,
    )


def _shown(value: Any) -> str:
    return repr(str(value)[:40])


def scheme_in(folder: Path | None) -> Scheme | None:
    """The scheme of a model's folder; None where no file tells of one that is read.

    What is wrong with the file is for the command to say, when it opens the model.
    """
    if folder is None:
        return None
    try:
        return scheme_of(read_json(folder / "config.json"), "")
    except UserError:
        return None


def declared(
    mode: QuantizeMode, *, double_quantization: bool, compute_dtype: str, llm_int8_threshold: float = 6.0
) -> dict[str, Any]:
    """``quantization_config`` as Transformers writes it."""
    four = mode == "4bit"
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if four else "fp4",
        "bnb_4bit_use_double_quant": four and double_quantization,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": llm_int8_threshold,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }
