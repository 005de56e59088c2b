"""The optimizer state of a sharded model: every process writes its own rows, and any number read them.

A part is a file with the optimizer's `state_dict()`, in which each sharded tensor holds only one process's
rows. The parts in order hold all rows, so a process finds its own however many processes wrote.
``optimizer.pt``, which a replica's checkpoint has, is a single part with all rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.checkpoint.manifest import describe_file
from falcon_qlora.checkpoint.process_state import OPTIMIZER
from falcon_qlora.checkpoint.read import check_optimizer
from falcon_qlora.checkpoint.write import save
from falcon_qlora.models.sharded import from_own_rows, local_tensor, own_rows


def has_parts(checkpoint: Path) -> bool:
    """Whether a sharded model was saved there with its optimizer."""
    return any(checkpoint.glob("optimizer-*-of-*.pt"))


def own_part(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's `state_dict()` with this process's rows alone."""
    whole = optimizer.state_dict()
    state = {
        index: {name: local_tensor(value) for name, value in of_parameter.items()}
        for index, of_parameter in whole["state"].items()
    }
    return {"state": state, "param_groups": whole["param_groups"]}


def write_part(
    part: dict[str, Any], folder: Path, *, process: int, processes: int
) -> dict[str, dict[str, Any]]:
    """Write what `own_part` returned, or a copy of it, into `folder`.

    Returns:
        The file's name, with its size and checksum for the manifest.

    Raises:
        OSError: if they cannot be written there.
    """
    file = folder / f"optimizer-{process + 1:05}-of-{processes:05}.pt"
    if not folder.is_dir():
        raise OSError(
            0, f"{folder} is not there: a sharded run's machines must share the folder it writes to"
        )
    save(part, file)
    return {file.name: describe_file(file)}


def read_own_rows(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Load this process's rows of the optimizer state; nothing is exchanged.

    Args:
        optimizer: over the same parameters as the one that was saved, sharded over any number of processes.
        checkpoint: verified.

    Raises:
        RuntimeError, ValueError, TypeError, LookupError: if the state is of other parameters or settings.
    """
    files = sorted(checkpoint.glob("optimizer-*-of-*.pt")) or [checkpoint / OPTIMIZER]
    # Memory-mapped: only the rows that are taken are read.
    parts = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: _own(parameters[index], [part["state"][index][name] for part in parts], name)
            for name in of_parameter
        }
        for index, of_parameter in parts[0]["state"].items()
    }
    whole = {"state": state, "param_groups": parts[0]["param_groups"]}
    check_optimizer(whole, optimizer)
    optimizer.load_state_dict(whole)


def _own(parameter: Tensor, pieces: list[Any], name: str) -> Any:
    """This process's part of a parameter's state, from the pieces of all processes that wrote."""
    if not isinstance(pieces[0], Tensor) or not pieces[0].dim():
        return pieces[0]  # the step count, the same in all
    if sum(map(len, pieces)) != len(parameter) or pieces[0].shape[1:] != parameter.shape[1:]:
        raise RuntimeError(f"{name} in the checkpoint does not fit a parameter of {tuple(parameter.shape)}")
    wanted, start = own_rows(parameter), 0
    found = []
    for piece in pieces:
        found.append(piece[max(wanted.start - start, 0) : max(wanted.stop - start, 0)])
        start += len(piece)
    return from_own_rows(parameter, torch.cat(found))  # a copy, which no longer needs the file
