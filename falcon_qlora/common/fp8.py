"""What FP8 products exclude: the only check of it, for settings, for a GPU and for every block."""

from __future__ import annotations

FIRST_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that have FP8."""


def fp8_excludes(
    *,
    kernels: str = "auto",
    lora_dropout: float = 0.0,
    scales: bool = False,
    prefix: bool = False,
    dtype: str = "bfloat16",
    device: str = "cuda",
    capability: tuple[int, int] | None = FIRST_CAPABILITY,
) -> str | None:
    """Why FP8 products cannot run: the first of these that excludes them. Leave out what is not known yet.

    Args:
        kernels: the setting of this name.
        lora_dropout: probability; LoRA beside FP8 products reads its whole input, without dropout.
        scales: whether learned vectors scale and shift the linears' outputs (Adapter v2).
        prefix: whether attention looks at a learned prefix (Adapter).
        dtype: of the activations, by PyTorch's name.
        device: the name of a CUDA GPU, or another device's type.
        capability: of a CUDA GPU; None for another device.

    Returns:
        A clause that says why, and what to do; None where FP8 can run.
    """
    if kernels == "off":
        return "fp8 needs fast kernels: drop --kernels off"
    if capability is None:
        return f"there is no FP8 on the {device.upper()}"
    if capability < FIRST_CAPABILITY:
        has, needs = (".".join(map(str, each)) for each in (capability, FIRST_CAPABILITY))
        return f"{device} has no FP8: its compute capability is {has}, and FP8 begins at {needs}"
    if dtype != "bfloat16":
        return f"FP8 products give bfloat16, and the model computes in {dtype}"
    if lora_dropout:
        return f"fp8 does not go with LoRA dropout {lora_dropout:g}: set --lora_dropout 0"
    if scales:
        return "fp8 does not go with scales and biases on the linears (Adapter v2)"
    if prefix:
        return "fp8 does not go with a learned prefix in attention (Adapter)"
    return None
