"""What each process must remember beside the weights, so that it goes on where it stopped."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

STATES = "processes.pt"
CURSOR = "stream.json.gz"


def random_states() -> dict[str, Any]:
    """The states of this process's random generators, as plain values and tensors."""
    name, keys, place, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), int(place), int(has_gauss), float(gauss)),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        # Of this process's device alone: to ask the others would take memory on each of them.
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.random.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def seed_anew(seed: int, *, step: int, process: int) -> None:
    """Seed this process where no state fits it: there were fewer processes, or more.

    Args:
        seed: the run's.
        step: that the run goes on from, so that no earlier draws are repeated.
        process: its index.
    """
    digest = hashlib.sha256(f"{seed} {step} {process}".encode()).digest()
    fresh = int.from_bytes(digest[:4], "little")
    random.seed(fresh)
    np.random.seed(fresh)
    torch.manual_seed(fresh)


def load_states(checkpoint: Path) -> list[dict[str, Any]]:
    """Each process's state, by process index."""
    return torch.load(checkpoint / STATES, map_location="cpu", weights_only=True)


def save_cursor(checkpoint: Path, cursor: dict[str, Any]) -> None:
    """Write where a stream's next step begins, the same for every process."""
    with gzip.open(checkpoint / CURSOR, "wt", encoding="utf-8", compresslevel=1) as handle:
        json.dump(cursor, handle)


def load_cursor(checkpoint: Path) -> dict[str, Any] | None:
    """What `save_cursor` wrote; None where there is none, and a stream is read again from its start."""
    if not (checkpoint / CURSOR).is_file():
        return None
    with gzip.open(checkpoint / CURSOR, "rt", encoding="utf-8") as handle:
        cursor: dict[str, Any] = json.load(handle)
    return cursor
