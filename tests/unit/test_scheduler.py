"""Who started a process: ranks of one run, or refused; and how many cores it may use."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from falcon_qlora.common.errors import UserError
from falcon_qlora.processes import cores, ranks, scheduler

# As srun 22.05 sets them for the last of three tasks, two on the first node.
OF_SRUN = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "PMI_SIZE": "3",
    "PMI_RANK": "2",
}


@pytest.fixture(autouse=True)
def of_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "ACCELERATE_", "TORCHELASTIC_", "MASTER_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    monkeypatch.setattr(os, "environ", before)


def test_a_task_of_srun_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ |= OF_SRUN
    scheduler.join()
    assert (ranks.process_index(), ranks.local_process_index(), ranks.world_size()) == (2, 0, 3)
    assert (ranks.local_world_size(), ranks.node_index()) == (1, 1)
    assert os.environ["MASTER_ADDR"] == "gpu03"
    assert 20_000 <= int(os.environ["MASTER_PORT"]) < 30_000


@pytest.mark.parametrize("missing", ["SLURM_STEP_ID", "SLURM_PROCID"])
def test_a_batch_script_is_no_task(missing: str) -> None:
    os.environ |= {name: value for name, value in OF_SRUN.items() if name[:5] == "SLURM"}
    del os.environ[missing]
    scheduler.join()
    assert ranks.world_size() == 1


def test_lists_of_slurm() -> None:
    assert scheduler.tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    lists = {"n1": "n1", "n1,n2": "n1", "gpu[03-05,9],cpu1": "gpu03", "a[1-2]-ib,b": "a1-ib", "x[7,9]": "x7"}
    assert {told: scheduler.first_host(told) for told in lists} == lists


@pytest.mark.parametrize(
    ("of_launcher", "name"),
    [
        ({"ACCELERATE_DYNAMO_MODE": "default"}, "accelerate launch"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "mpirun"),
    ],
)
@pytest.mark.parametrize("module", ["falcon_qlora.train", "falcon_qlora"])
def test_others_are_refused_in_one_line(of_launcher: dict[str, str], name: str, module: str) -> None:
    words = [sys.executable, "-m", module, *["train"][: module == "falcon_qlora"], "-m", "tiny"]
    result = subprocess.run(words, env=os.environ | of_launcher, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    (told,) = result.stderr.splitlines()
    assert told.startswith(f"error: {name}")
    assert told.endswith("start it with `falcon-qlora train` on one machine, or on each node with --nnodes")


def test_mpirun_of_one_process_is_a_run_of_one() -> None:
    os.environ |= {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    scheduler.refuse_others()


def test_srun_of_launchers_without_nodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from falcon_qlora.commands import train

    os.environ |= OF_SRUN
    with pytest.raises(UserError, match="srun has started 3 of this command"):
        train.main(["-m", "tiny"])


def test_variables_of_torchrun_are_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    from falcon_qlora.commands import launch_flags, train

    os.environ |= {
        "PET_NNODES": "4",
        "PET_NPROC_PER_NODE": "auto",
        "PET_NODE_RANK": "3",
        "PET_MASTER_ADDR": "h",
    }
    assert launch_flags.of_environment({"node_rank": 1}) == {"nnodes": "4", "master_addr": "h"}
    os.environ["PET_NNODES"] = "four"
    with pytest.raises(UserError, match="neither a number of nodes"):
        train.main(["-m", "tiny"])


def test_a_control_group_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "_GROUPS", tmp_path)
    assert cores.usable_cores() == 8
    for quota, expected in (("max", 8), ("350000", 3), ("50000", 1)):
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        monkeypatch.setattr(cores, "_OWN", tmp_path / "own")
        (tmp_path / "own").write_text("0::/somewhere/else\n")
        assert cores.usable_cores() == expected
    (tmp_path / "own").write_text("4:cpu,cpuacct:/job\n0::/\n")
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu,cpuacct/job").mkdir(parents=True)
    for name, value in (("quota", "250000"), ("period", "100000")):
        (tmp_path / f"cpu,cpuacct/job/cpu.cfs_{name}_us").write_text(value)
    assert cores.usable_cores() == 2


def test_work_on_one_core_leaves_other_threads_all_of_them() -> None:
    def elsewhere() -> int:
        with ThreadPoolExecutor(1) as fresh:  # what a thread begins with, it keeps
            return fresh.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ZeroDivisionError), cores.on_one_core():
            assert (torch.get_num_threads(), elsewhere()) == (1, 3)
            raise ZeroDivisionError
        assert (torch.get_num_threads(), elsewhere()) == (3, 3)
    finally:
        torch.set_num_threads(before)
