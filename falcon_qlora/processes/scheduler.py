"""Who started this process: torchrun, and ``srun`` with one task a GPU, make ranks; others are refused.

Imports no torch.
"""

from __future__ import annotations

import os
import re

from falcon_qlora.common.errors import UserError
from falcon_qlora.processes import launcher, ranks

_HOW = "start it with `falcon-qlora train` on one machine, or on each node with --nnodes"
# Set only by the launcher that is named, with the number of its processes where it has one.
_FOREIGN = {
    "accelerate launch": ("ACCELERATE_DYNAMO_MODE", None),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpirun (MPICH, Intel MPI)": ("PMI_RANK", "PMI_SIZE"),
    "mpirun (MVAPICH)": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
}
_FIRST_PORT, _PORTS = 20_000, 10_000


def tasks_of_srun() -> int:
    """How many tasks ``srun`` has started with this one; 1 without it, and in a batch script."""
    of_step = "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ
    told = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    return int(told) if of_step else 1


def refuse_others() -> None:
    """Refuse launchers whose processes would each train alone.

    Raises:
        UserError: naming the launcher, and how to start.
    """
    for name, (sign, count) in _FOREIGN.items():
        of_srun = name != "accelerate launch" and "SLURM_STEP_ID" in os.environ  # which sets some of them too
        if sign in os.environ and not of_srun and (count is None or os.environ.get(count, "1") != "1"):
            raise UserError(f"{name} is not supported: {_HOW}")


def join() -> None:
    """Have this process, which is to train, be the rank that its launcher means.

    Raises:
        UserError: as `refuse_others`.
    """
    if launcher.VARIABLE in os.environ:
        return
    refuse_others()
    if "TORCHELASTIC_RUN_ID" not in os.environ and tasks_of_srun() > 1:
        ranks.be(**_of_srun())


def _of_srun() -> dict[str, str]:
    """torchrun's variables, from those of Slurm."""
    get = os.environ.get
    node = int(get("SLURM_NODEID", "0"))
    per_node = tasks_per_node(get("SLURM_STEP_TASKS_PER_NODE") or get("SLURM_TASKS_PER_NODE", "1"))
    job = int(get("SLURM_JOB_ID", "0")) * 31 + int(get("SLURM_STEP_ID", "0"))
    found = {
        "RANK": get("SLURM_PROCID", "0"),
        "LOCAL_RANK": get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": str(tasks_of_srun()),
        "LOCAL_WORLD_SIZE": str(per_node[min(node, len(per_node) - 1)]),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": first_host(get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST", "localhost")),
        "MASTER_PORT": str(_FIRST_PORT + job % _PORTS),
    }
    given = ("MASTER_ADDR", "MASTER_PORT")  # which a user may know better
    return {name: get(name, value) if name in given else value for name, value in found.items()}


def tasks_per_node(told: str) -> list[int]:
    """``2(x3),1`` is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", told)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: of ``gpu[03-05,9],cpu1`` it is ``gpu03``."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes
