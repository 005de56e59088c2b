"""Which process this is, of how many: what torchrun has put into the environment, which nothing else reads.

Imports no torch.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path


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


def restart_count() -> int:
    """How often torchrun has restarted this group of processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str:
    """What this launch is called: the same over torchrun's restarts, another for every new command.

    torchrun's own name for the job, or where it was given none its agent's process, our parent.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if job != "none":
        return job
    agent = os.getppid()
    try:
        # A container gives every launch the same process number; they do not start at the same moment.
        started = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{socket.gethostname()} {agent} {started}".rstrip()
