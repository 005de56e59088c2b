"""Going on from a checkpoint: what each process remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from falcon_qlora.checkpoint.process_state import load_states


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
