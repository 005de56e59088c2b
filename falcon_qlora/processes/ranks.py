"""Which process this is, of how many: read from torchrun's environment variables.

Imports no torch.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def stand_alone() -> None:
    """Have this process be no rank, whatever a scheduler or another job left in its environment."""
    for name in _OF_A_RANK:
        os.environ.pop(name, None)


def be(**variables: str) -> None:
    """Have this process be the rank that these variables of torchrun's say."""
    os.environ.update(variables)


def process_index() -> int:
    """This process's index over all nodes, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_process_index() -> int:
    """This process's index on its node, from 0: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes train together, over all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many processes run on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    return process_index() == 0


def named() -> str:
    """This process, for messages: ``rank 1 on HOST``."""
    return f"rank {process_index()} on {socket.gethostname()}"


def restart_count() -> int:
    """How often torchrun has restarted this group of processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def set_restart_count(count: int) -> None:
    """Have `restart_count` say what the processes have agreed on."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(count)


def node_index() -> int:
    """The index of this process's node, from 0; that of the main process is 0."""
    return int(os.environ.get("GROUP_RANK", process_index() // local_world_size()))


def launch_id() -> str:
    """A name for this launch: the same over torchrun's restarts, another for every new command.

    It is torchrun's id of the job or, if none was given, the process of its agent, our parent.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if job != "none":
        return job
    agent = os.getppid()
    try:
        # In a container every launch may have the same process id, but not the same start time.
        stat = Path(f"/proc/{agent}/stat").read_text(encoding="utf-8", errors="replace")
        started = stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{socket.gethostname()} {agent} {started}".rstrip()
