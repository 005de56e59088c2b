"""The state of each process beside the weights, so that a run resumes where it stopped."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch.distributed import DistError
from transformers import set_seed

from falcon_qlora.common.errors import UserError, one_line
from falcon_qlora.common.files import disk_errors
from falcon_qlora.data.cursor import check_cursor

# A checkpoint's files, under Transformers' names where it has them too.
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
SCALER = "scaler.pt"
TRAINER_STATE = "trainer_state.json"
STATES = "processes.pt"
CURSOR = "stream.json.gz"
# A cursor may unpack to this many bytes, or to this many times its file: text compresses no further unless it
# repeats itself.
_CURSOR_BYTES = 2**28
_CURSOR_RATIO = 64
# What loading content of an unexpected form may raise.
_OF_CONTENT = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OverflowError),
    *(OSError, EOFError, zlib.error),
)


def random_states() -> dict[str, Any]:
    """The states of this process's random generators, as plain values and tensors."""
    name, keys, place, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), int(place), int(has_gauss), float(gauss)),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        # This process's device only: asking the others would allocate memory on each.
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
    """Seed this process anew if the checkpoint was saved by another number of processes.

    Args:
        seed: the run's.
        step: that the run resumes from, so that no earlier draws are repeated.
        process: its index.
    """
    digest = hashlib.sha256(f"{seed} {step} {process}".encode()).digest()
    set_seed(int.from_bytes(digest[:4], "little"))


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn errors in reading or loading a checkpoint's file into a `UserError` that names it.

    A checksum shows that a file is unchanged since the manifest, not that training wrote it.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError, DistError):
        raise
    except (pickle.UnpicklingError, SafetensorError, *_OF_CONTENT) as error:
        # For a pickle, torch's message advises to open it anyway.
        told = "" if isinstance(error, pickle.UnpicklingError) else one_line(error)
        told = told or "it holds more than plain values and tensors"
        raise UserError(
            f"{file} cannot be loaded: {told}. It is not what training wrote, or of another run. Resume "
            "from another checkpoint (--resume CHECKPOINT), or start the run again with --overwrite"
        ) from None


def check_plain(file: Path, kind: type, *, mapped: bool = True) -> Any:
    """What a torch file holds.

    Args:
        file: to read.
        kind: what it must hold.
        mapped: map the tensors instead of reading them; they then need the file.

    Raises:
        UserError: if it holds anything but a `kind` of plain values and tensors.
    """
    with reading(file):
        content = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
        if not isinstance(content, kind):
            raise TypeError(f"it holds a {type(content).__name__}, not a {kind.__name__}")
        return content


def load_states(checkpoint: Path) -> list[dict[str, Any]]:
    """Each process's state, by process index.

    Raises:
        UserError: if the file holds anything else.
    """
    states: list[dict[str, Any]] = check_plain(checkpoint / STATES, list)
    if not states or not all(isinstance(state, dict) for state in states):
        with reading(checkpoint / STATES):
            raise ValueError("it holds no process's state")
    return states


def save_cursor(checkpoint: Path, cursor: dict[str, Any]) -> None:
    """Write where a stream's next step begins, the same for every process."""
    file = checkpoint / CURSOR
    with disk_errors(file), gzip.open(file, "wt", encoding="utf-8", compresslevel=1) as handle:
        json.dump(cursor, handle)


def read_cursor(checkpoint: Path, *, step: int, vocabulary: int) -> dict[str, Any] | None:
    """What `save_cursor` wrote; None if there is none: the stream is read again from its start.

    Raises:
        UserError: if it is damaged, not JSON, unpacks to far more than rows and documents do, or is not what
            a stream writes at `step`.
    """
    file = checkpoint / CURSOR
    if not file.is_file():
        return None
    most = max(_CURSOR_BYTES, _CURSOR_RATIO * file.stat().st_size)
    with reading(file):
        with gzip.open(file, "rb") as handle:
            content = handle.read(most + 1)
        if len(content) > most:
            raise ValueError(f"unpacked it has more than {most:,} bytes")
        cursor: dict[str, Any] = json.loads(content)
        check_cursor(cursor, step=step, vocabulary=vocabulary)
    return cursor
