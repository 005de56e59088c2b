"""A quantized linear as Transformers stores it with bitsandbytes: several tensors, named after its weight.

NF4: the packed codes under the weight's own name; ``weight.absmax``, the scales; ``weight.quant_map``, what
the codes stand for; ``weight.quant_state.bitsandbytes__nf4``, the rest as JSON. Under double quantization the
scales are codes too, for ``weight.nested_quant_map``, with scales ``weight.nested_absmax`` and an offset in
the JSON. LLM.int8(): int8 rows, their largest absolute values in ``SCB``, and ``weight_format``, 0 for rows.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from falcon_qlora.common.errors import UserError
from falcon_qlora.kernels.ops import int8_scales
from falcon_qlora.models.prepared import changed_since
from falcon_qlora.models.quantize import put_nf4, put_rows, quantize_mode_of
from falcon_qlora.models.schemes import NF4_BLOCK, NF4_NESTED_BLOCK, Scheme

_STATE = "quant_state.bitsandbytes__nf4"
_STATE_BYTES = 2**12  # of the JSON, at most


def names_beside(name: str, scheme: Scheme) -> list[str]:
    """Names of the tensors that are stored with a linear's weight, given the weight's name."""
    if scheme.mode == "8bit":
        module = name.removesuffix(".weight")
        return [f"{module}.SCB", f"{module}.weight_format"]
    parts = ["absmax", "quant_map", _STATE]
    parts += ["nested_absmax", "nested_quant_map"] if scheme.double_quantization else []
    return [f"{name}.{part}" for part in parts]


def tensors_of(layer: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors to store for a filled quantized layer, whose weight has the name `name`."""
    weight: Any = layer.weight
    yield name, weight.data
    if quantize_mode_of(layer) == "8bit":
        module = name.removesuffix(".weight")
        yield f"{module}.SCB", int8_scales(layer)
        yield f"{module}.weight_format", torch.zeros((), dtype=torch.uint8)
        return
    for part, tensor in weight.quant_state.as_dict(packed=True).items():
        yield f"{name}.{part}", tensor


@dataclass(frozen=True)
class StoredLinear:
    """A linear's weight as it is stored, checked, on the device that it will be on.

    Attributes:
        scheme: how it is stored.
        shape: ``[out, in]`` of the weight that it stands for.
        parts: by their names behind the weight's or the module's; the weight's is ``weight``.
        offset: of the scales, where these are quantized.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    parts: dict[str, Tensor]
    offset: float | None = None

    def fill(self, layer: Any, dtype: torch.dtype) -> None:
        """Have an empty quantized layer hold this weight; `dtype`: what it is dequantized to."""
        parts = self.parts
        if self.scheme.mode == "8bit":
            put_rows(layer, parts["weight"], parts["SCB"])
            return
        state = bnb.functional.QuantState(
            absmax=parts["absmax"].reshape(-1),
            shape=torch.Size(self.shape),
            code=parts["quant_map"],
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
        if self.scheme.double_quantization:
            state.nested = True
            state.offset = torch.tensor(self.offset, dtype=torch.float32, device=parts["absmax"].device)
            state.state2 = bnb.functional.QuantState(
                absmax=parts["nested_absmax"],
                code=parts["nested_quant_map"],
                blocksize=NF4_NESTED_BLOCK,
                dtype=torch.float32,
            )
        put_nf4(layer, parts["weight"].reshape(-1, 1), state)


def read_linear(
    name: str,
    scheme: Scheme,
    tensors: Mapping[str, Tensor],
    *,
    place: Callable[[str, Tensor], Tensor],
    source: str,
) -> StoredLinear:
    """Check that a quantized linear is stored as its scheme says, and put it on its device.

    Args:
        name: of its weight.
        scheme: of the checkpoint.
        tensors: its weight and those of `names_beside` that there are, by name, on the CPU.
        place: takes each tensor and its name, and returns it on the device.
        source: the checkpoint, for messages.

    Raises:
        UserError: if it is incomplete, or stored in another way.
    """
    read = _read_rows if scheme.mode == "8bit" else _read_nf4
    parts, shape, offset = read(name, scheme, tensors, source)
    placed = {each: place(each, tensor) for each, tensor in tensors.items()}
    return StoredLinear(scheme, shape, {part: placed[each] for part, each in parts.items()}, offset)


_Read = tuple[dict[str, str], tuple[int, ...], float | None]


def _read_rows(name: str, scheme: Scheme, tensors: Mapping[str, Tensor], source: str) -> _Read:
    scales_name, format_name = names_beside(name, scheme)
    if scales_name not in tensors:
        raise _other(source, name, f"{scales_name} is missing")
    weight, scales = tensors[name], tensors[scales_name]
    # Files from before bitsandbytes 0.38 have no format; they hold rows too.
    if format_name in tensors and tensors[format_name].tolist() not in (0, [0]):
        raise _other(source, name, "its int8 codes are not stored in rows")
    for stored, tensor, dtype in ((name, weight, torch.int8), (scales_name, scales, torch.float32)):
        if tensor.dtype != dtype:
            raise _other(source, name, f"{stored} is {tensor.dtype}, not {dtype}")
    if weight.dim() != 2 or tuple(scales.shape) != (weight.shape[0],):
        raise _other(source, name, f"{list(weight.shape)} codes have {list(scales.shape)} scales")
    return {"weight": name, "SCB": scales_name}, tuple(weight.shape), None


def _read_nf4(name: str, scheme: Scheme, tensors: Mapping[str, Tensor], source: str) -> _Read:
    if f"{name}.{_STATE}" not in tensors:
        raise _other(source, name, f"{name}.{_STATE} is missing")
    told = _state(tensors[f"{name}.{_STATE}"], name, source)
    nested = f"{name}.nested_absmax" in tensors
    expected = {"quant_type": "nf4", "blocksize": NF4_BLOCK}
    expected |= {"nested_blocksize": NF4_NESTED_BLOCK} if nested else {}
    for each, value in expected.items():
        if told.get(each) != value:
            raise _other(source, name, f"its {each} is {str(told.get(each))[:40]!r}, not {value!r}")
    if nested != scheme.double_quantization:
        how = "quantized too" if nested else "not quantized"
        raise _other(source, name, f"its scales are {how}, config.json says otherwise")
    shape, offset = told.get("shape"), told.get("nested_offset")
    fits = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    if not fits or (nested and not (isinstance(offset, float) and math.isfinite(offset))):
        raise _other(source, name, f"{name}.{_STATE} is damaged")
    assert isinstance(shape, list)
    numbers = math.prod(shape)
    blocks = -(-numbers // NF4_BLOCK)
    forms = {
        "weight": (torch.uint8, (numbers + 1) // 2),
        "absmax": (torch.uint8 if nested else torch.float32, blocks),
        "quant_map": (torch.float32, 16),
    }
    if nested:
        forms |= {"nested_absmax": (torch.float32, -(-blocks // NF4_NESTED_BLOCK))}
        forms |= {"nested_quant_map": (torch.float32, 256)}
    parts = {}
    for part, (dtype, size) in forms.items():
        parts[part] = stored = name if part == "weight" else f"{name}.{part}"
        if stored not in tensors:
            raise _other(source, name, f"{stored} is missing")
        tensor = tensors[stored]
        if tensor.dtype != dtype or tensor.numel() != size:
            raise _other(source, name, f"{stored} is {tensor.dtype} {list(tensor.shape)}, not {size} {dtype}")
    # bitsandbytes' kernels have the tables built in and do not read the stored ones.
    for part, table in (("quant_map", _nf4_table()), ("nested_quant_map", _nested_table())):
        if part in parts and not torch.equal(tensors[parts[part]].reshape(-1), table):
            raise _other(source, name, f"{parts[part]} is not bitsandbytes' own table")
    return parts, tuple(shape), offset if nested else None


def _state(packed: Tensor, name: str, source: str) -> dict[str, Any]:
    if packed.dtype == torch.uint8 and packed.numel() <= _STATE_BYTES:
        try:
            told = json.loads(bytes(packed.reshape(-1).tolist()))
        except (ValueError, RecursionError):
            told = None
        if isinstance(told, dict):
            return told
    raise _other(source, name, f"{name}.{_STATE} is damaged")


def _other(source: str, name: str, what: str) -> UserError:
    return UserError(
        f"{source}: {name} is not stored as its config.json says: {what}. Download it again, or name the "
        "model that it was made of"
    )


@functools.cache
def _nf4_table() -> Tensor:
    return bnb.functional.get_4bit_type("nf4", device="cpu")


@functools.cache
def _nested_table() -> Tensor:
    return bnb.functional.create_dynamic_map()


class Sums:
    """Sums of stored tensors' bytes, taken on the device that they are on, where that costs next to nothing.

    A change of any one number changes a sum. They find damage, not intent.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the sum of a stored tensor."""
        content = tensor.detach().reshape(-1).view(torch.uint8)
        whole = content.numel() // 4 * 4
        total = content[whole:].sum(dtype=torch.int64)
        # In pieces on the CPU, where the numbers are converted before they are added.
        for piece in content[:whole].view(torch.int32).split(2**40 if tensor.is_cuda else 2**18):
            total = total + piece.sum(dtype=torch.int64)
        self._sums[name] = total

    def values(self) -> dict[str, int]:
        """All sums, by name."""
        return {name: int(total) for name, total in self._sums.items()}

    def check(self, expected: Mapping[str, int], source: str) -> None:
        """Raise a `UserError` if a sum differs from what was recorded of it."""
        for name, value in self.values().items():
            if expected.get(name) != value:
                raise changed_since(source, name)
