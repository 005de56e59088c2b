"""Going on from a checkpoint: the adapter's weights, and what each process remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from falcon_qlora.checkpoint.process_state import load_states


def restore_adapter(model: Any, folder: Path) -> None:
    """Put a checkpoint's adapter weights into `model`.

    Raises:
        RuntimeError: if the folder's adapter has other weights than the model's.
    """
    weights = load_file(folder / "adapter_model.safetensors")
    result = set_peft_model_state_dict(model, weights)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    if result.unexpected_keys or len(weights) != trained:
        odd = (
            result.unexpected_keys[0] if result.unexpected_keys else f"{len(weights)} tensors, not {trained}"
        )
        raise RuntimeError(f"{folder} does not fit this model: {odd}")


def read_process(checkpoint: Path, *, process: int, processes: int) -> dict[str, Any]:
    """What this process had remembered: `random` (see `process_state`), and what else the trainer keeps.

    With another number of processes there is no `random`, and of the `loss` since the last log line each has
    the mean over those that there were.
    """
    states = load_states(checkpoint)
    if len(states) == processes:
        return states[process]
    rest = {name: value for name, value in states[0].items() if name != "random"}
    return rest | {"loss": sum(state["loss"] for state in states) / len(states)}
