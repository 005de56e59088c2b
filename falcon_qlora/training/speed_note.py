"""How fast a run should be on its GPU, and what would make it faster: one note for its start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from falcon_qlora.config import Configuration
from falcon_qlora.models.fast_path import may_run_in_fp8, missing_libraries
from falcon_qlora.processes import devices
from falcon_qlora.training.cards import MEASURED
from falcon_qlora.training.estimate import Estimate

_INSTALL = "pip install 'falcon-qlora[kernels]'"
LIBRARIES, LIBRARIES_IN_FP8 = f"{_INSTALL} (1.05 times)", f"{_INSTALL} (1.08 times)"
FP8 = "--compute_dtype fp8 (1.4 times, with coarser gradients)"


def speed_note(configuration: Configuration, model: Any, estimate: Estimate | None) -> str | None:
    """The note; None on a CPU, and where nothing is known.

    Args:
        configuration: of the run.
        model: with a method attached.
        estimate: from `estimate_here`.
    """
    device, settings = devices.local_device(), configuration.model
    if device.type != "cuda":
        return None
    in_fp8, faster = settings.compute_dtype == "fp8", []
    if settings.kernels in ("auto", "required") and missing_libraries(model, device, fp8_products=in_fp8):
        faster.append(LIBRARIES_IN_FP8 if in_fp8 else LIBRARIES)
    if settings.kernels != "off" and not in_fp8 and may_run_in_fp8(model, device):
        faster.append(FP8)
    return told(estimate, faster)


def told(estimate: Estimate | None, faster: Sequence[str]) -> str | None:
    """The note of `speed_note`; `faster`: what would make the run faster."""
    parts = []
    if estimate is not None and estimate.tokens_per_second is not None and estimate.card is not None:
        speed = f"{round(estimate.tokens_per_second, -2):,.0f} tokens/s"
        parts.append(f"estimated: {speed} and {estimate.card_gib:.1f} GiB of the card; {estimate.basis}")
    if faster:
        parts.append(f"faster, as measured with Falcon-7B on an {MEASURED.title}: {'; '.join(faster)}")
    return ". ".join(parts) or None
