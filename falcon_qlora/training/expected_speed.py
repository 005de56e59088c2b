"""How fast a run should be on its GPU, and what would make it faster: one note for its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from falcon_qlora.config import Configuration
from falcon_qlora.methods.lora import Lora
from falcon_qlora.models.fast_path import may_run_in_fp8, missing_libraries, runs_fast
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.processes import devices
from falcon_qlora.training.activations import Activations

GPU = "H200"
TERAFLOPS = {"bf16": (500, 600), "fp8": (710, 920)}
"""Of steps on an H200, by 4 operations a parameter and token: least and most of `Run.is_as_measured`."""
LEAST_PARAMETERS = 6.5e9
LEAST_TOKENS = 8192
LIBRARIES = "pip install 'falcon-qlora[kernels]' (1.05 times)"
FP8 = "--compute_dtype fp8 (1.4 times, with coarser gradients)"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the speed depends on.

    Attributes:
        gpu: its name.
        parameters: of the model, a tied head counted once.
        micro_batch_tokens: on one device.
        in_fp8: whether the frozen products run in FP8.
        plain_lora: whether LoRA is trained, without dropout.
        all_fast: whether every block is a fast block that keeps its activations.
        mixes: whether blocks have a state space too: measured in bf16, with larger micro batches.
    """

    gpu: str
    parameters: int
    micro_batch_tokens: int
    in_fp8: bool
    plain_lora: bool
    all_fast: bool
    mixes: bool = False

    @property
    def is_as_measured(self) -> bool:
        """Whether it is like the rows of ``tests/benchmarks/records.csv`` that `TERAFLOPS` spans."""
        large = self.parameters >= LEAST_PARAMETERS and self.micro_batch_tokens >= LEAST_TOKENS
        if self.mixes:
            large = large and self.micro_batch_tokens >= 2 * LEAST_TOKENS and not self.in_fp8
        return GPU in self.gpu and large and self.plain_lora and self.all_fast

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """The least and the most of a GPU, of documents of 512 to 2,048 tokens."""
        least, most = TERAFLOPS["fp8" if self.in_fp8 else "bf16"]
        return least * 1e12 / (4 * self.parameters), most * 1e12 / (4 * self.parameters)


def speed_note(
    configuration: Configuration, model: Any, kernels: dict[str, str], activations: Activations
) -> str | None:
    """The note; None on a CPU, and where nothing is known.

    Args:
        configuration: of the run.
        model: with a method attached.
        kernels: from `choose_kernels`.
        activations: from `choose_activations`.
    """
    device, settings, method = devices.local_device(), configuration.model, configuration.method
    if device.type != "cuda":
        return None
    in_fp8, faster = settings.compute_dtype == "fp8", []
    if settings.kernels in ("auto", "required") and missing_libraries(model, device, fp8_products=in_fp8):
        faster.append(LIBRARIES)
    if settings.kernels != "off" and not in_fp8 and may_run_in_fp8(model, device):
        faster.append(FP8)
    fast = bool(kernels) and all(map(runs_fast, kernels.values()))
    layout = layout_of(model.config)
    run = Run(
        gpu=torch.cuda.get_device_name(device),
        parameters=layout.parameter_count(),
        micro_batch_tokens=configuration.run.per_device_train_batch_size * configuration.data.max_length,
        in_fp8=in_fp8,
        plain_lora=isinstance(method, Lora) and not method.dropout,
        all_fast=fast and set(activations.blocks) == {"none"},
        mixes=bool(layout.other_mixers()),
    )
    return told(run, faster)


def told(run: Run, faster: Sequence[str]) -> str | None:
    """The note of `speed_note`; `faster`: what would make the run faster."""
    parts = []
    if run.is_as_measured:
        least, most = (f"{round(speed, -2):,.0f}" for speed in run.tokens_per_second)
        parts.append(f"expect {least} to {most} tokens/s of each {GPU} with documents of 512 to 2,048 tokens")
    if faster:
        parts.append(f"faster, as measured with Falcon-7B on an {GPU}: {'; '.join(faster)}")
    return ". ".join(parts) or None
