"""The GPUs that an estimate knows: the memory that CUDA can use, and the published ceilings."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.quantities import GIB

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *(?:GiB|G)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU.

    Attributes:
        name: as `--gpu` takes it.
        title: its name for readers, the part by which PyTorch's name of the device is recognised.
        gib: memory that CUDA can use, GiB; what is printed on the box less what the driver keeps.
        bf16: TFLOP/s of dense bfloat16 products with float32 sums, published, of a card without them
            float16's; None where nothing is known.
        fp8: the same in FP8; None without FP8.
        terabytes: a second from its memory, published; 10^12 bytes.
        bfloat16: whether it computes in bfloat16.
        pcie: gigabytes a second that its slot brings from CPU memory, published; 10^9 bytes.
    """

    name: str
    title: str
    gib: float
    bf16: float | None = None
    fp8: float | None = None
    terabytes: float | None = None
    bfloat16: bool = True
    pcie: float = 31.5


CARDS = {
    card.name: card
    for card in (
        Card(name="t4", title="T4", gib=14.6, bf16=65, terabytes=0.32, bfloat16=False, pcie=15.75),
        Card(name="3090", title="RTX 3090", gib=23.6, bf16=71, terabytes=0.936),
        Card(name="4090", title="RTX 4090", gib=23.6, bf16=165, fp8=330, terabytes=1.008),
        Card(name="5090", title="RTX 5090", gib=31.4, bf16=210, fp8=419, terabytes=1.792, pcie=63),
        Card(name="a10", title="A10", gib=22.0, bf16=125, terabytes=0.6),
        Card(name="l4", title="L4", gib=22.0, bf16=121, fp8=242, terabytes=0.3),
        Card(name="a6000", title="RTX A6000", gib=47.5, bf16=155, terabytes=0.768),
        Card(name="a100-40", title="A100 40GB", gib=39.4, bf16=312, terabytes=1.555),
        Card(name="a100-80", title="A100 80GB", gib=79.2, bf16=312, terabytes=2.039),
        Card(name="h100", title="H100", gib=79.2, bf16=989, fp8=1979, terabytes=3.35, pcie=63),
        Card(name="h200", title="H200", gib=139.8, bf16=989, fp8=1979, terabytes=4.8, pcie=63),
    )
}
MEASURED = CARDS["h200"]
"""The only card that steps were measured on."""


def card_of(text: str) -> Card:
    """The card that `--gpu` names: one of `CARDS`, or a size such as ``24GiB`` of a card not known else.

    Raises:
        UserError: if it is neither.
    """
    name = text.strip().lower()
    if name in CARDS:
        return CARDS[name]
    size = _SIZE.fullmatch(name)
    if size and float(size[1]) > 0:
        return Card(
            name=f"{float(size[1]):g}GiB", title=f"a card of {float(size[1]):g} GiB", gib=float(size[1])
        )
    near = [known for known in CARDS if known in name or (name and name in known)]
    meant = f" (did you mean {near[0]}?)" if len(near) == 1 else ""
    raise UserError(
        f"--gpu {text!r} is not known{meant}: give one of {', '.join(CARDS)}, or its memory (24GiB)"
    )


def card_here() -> Card | None:
    """This process's GPU, with all of its memory, whatever is free of it; None on the CPU."""
    import torch

    from falcon_qlora.processes import devices

    device = devices.local_device()
    if device.type != "cuda":
        return None
    name, gib = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1] / GIB
    known = card_named(name, gib) or Card(name=name, title=name, gib=gib)
    return replace(known, gib=gib, bfloat16=devices.has_bfloat16(device))


def card_named(device: str, gib: float) -> Card | None:
    """The card that PyTorch calls `device`, with `gib` of memory; None if it is not one of `CARDS`."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    found = [each for each in CARDS.values() if each.name.partition("-")[0] in words]
    return min(found, key=lambda card: abs(card.gib - gib), default=None)
