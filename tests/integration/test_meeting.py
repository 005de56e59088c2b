"""A rank that dies before the others know of it, where no launcher ends them: they name it, and end."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time

import pytest

from tests.integration.runs import ENVIRONMENT

WORDS = "-m tiny --dataset_name sample --steps 1 --report_to none --device cpu".split()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def start(launched: list[str], dies: bool, words: list[str], **more: str) -> subprocess.Popen[str]:
    """A rank that dies before it has imported anything, or one that trains and waits for 0.1 minutes."""
    return subprocess.Popen(
        [*launched, "-m", "tests.cluster.dies_early", *WORDS, "--meet_minutes", "0.1", *words],
        env={**os.environ, **ENVIRONMENT, "DIES": "1" if dies else "", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    ends = []
    for each in processes:
        try:
            errors = each.communicate(timeout=120)[1]
        finally:
            each.kill()
        ends.append((each.returncode, errors))
    return ends


def of_srun(rank: int, tasks: int, port: int) -> dict[str, str]:
    """What Slurm's tasks have, all on one node."""
    told = {"PROCID": rank, "LOCALID": rank, "STEP_ID": 0, "JOB_ID": 7, "STEP_NUM_TASKS": tasks}
    told |= {"STEP_TASKS_PER_NODE": tasks, "NODEID": 0, "STEP_NODELIST": "localhost"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {f"SLURM_{name}": str(value) for name, value in told.items()} | place


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_tasks_of_srun_name_the_one_that_has_not_come_and_end(tmp_path: object, dead: int) -> None:
    port, began = free_port(), time.monotonic()
    words = ["--output_dir", f"{tmp_path}/run"]
    ranks = [start([sys.executable], rank == dead, words, **of_srun(rank, 3, port)) for rank in range(3)]
    ends = ended(ranks)
    assert time.monotonic() - began < 60  # with the libraries, on a busy machine
    assert [status for status, _ in ends] == [-9 if rank == dead else 2 for rank in range(3)]
    lines = [line for _, errors in ends for line in errors.splitlines()]
    where = f" to 127.0.0.1:{port}" if dead == 0 else ""
    assert len(lines) == 2, lines
    assert re.fullmatch(
        rf"note: rank {dead} has not come for 3 s{where}: waiting for up to 3 s more \(--meet_minutes\)",
        lines[0],
    )
    assert lines[1] == (
        f"error: rank {dead} did not come within 6 s{where}: not started, or ended before it met the others. "
        "See its own output; --meet_minutes waits for longer"
    )


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_so_do_the_nodes_of_torchrun(tmp_path: object, dead: int) -> None:
    """Two agents, whose workers take themselves for two nodes."""
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    meet += ["--master-port", str(free_port()), "--log-dir", str(tmp_path)]
    words = ["--output_dir", f"{tmp_path}/run"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meet]
    agents = [start([*torchrun, "--node-rank", str(rank)], rank == dead, words) for rank in range(2)]
    status, errors = ended(agents)[1 - dead]
    assert status == 1
    (told,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert told.startswith((f"error: rank {dead} did not come within 6 s", "error: the ranks have not met ("))
    assert "Traceback" not in errors.partition("torch/distributed")[0]


def test_a_rank_that_comes_late_is_waited_for(tmp_path: object) -> None:
    port = free_port()
    code = (
        "import sys, time; from falcon_qlora.processes import meeting; time.sleep(float(sys.argv[1])); "
        "print([each['node'] for each in meeting.meet(60)[2]])"
    )
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for late in (0, 1):
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", code, "1" if rank == late else "0"],
                env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        assert [each.communicate(timeout=60) for each in ranks] == [("[0, 0]\n", "")] * 2
