"""Which device a process takes, and that replicas which differ are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from falcon_qlora.processes import devices, endings, ranks

REPLICAS = """
import torch
import torch.distributed as dist
from falcon_qlora.processes import agreement, endings

dist.init_process_group("gloo")
large = torch.zeros(2**22 + 7, dtype=torch.uint8)
trained, packed = torch.arange(100.0), torch.arange(250, dtype=torch.uint8)
others = [torch.zeros(3, dtype=torch.bool), torch.empty(0), torch.tensor(3.0)]

def same(told, change):
    before = [tensor.clone() for tensor in (large, trained, packed)]
    if dist.get_rank() == 1:
        change()
    try:
        agreement.check_replicas([large, trained, packed, *others])
        found = "the same"
    except agreement.ReplicasDifferError as error:
        found = error
    if dist.get_rank() == 0:
        print(f"{told}: {found}")
    for tensor, was in zip((large, trained, packed), before):
        tensor.copy_(was)

same("nothing", lambda: None)
same("one value", lambda: trained[7:8].add_(1e-6))
same("exchanged bytes", lambda: packed[3:5].copy_(packed[[4, 3]]))
same("1, -2, 1", lambda: packed[10:13].add_(torch.tensor([1, 254, 1], dtype=torch.uint8)))
same("the last byte", lambda: large[-1:].fill_(1))
same("byte 65520", lambda: large[65520:65521].fill_(1))
same("nothing again", lambda: None)
endings.leave(0)
"""


def test_a_replica_lies_on_the_gpu_of_its_local_index_on_any_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.local_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.local_device() == torch.device("cuda", 1)


def test_a_launch_is_told_from_every_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    assert ranks.launch_id() == "job 7"
    # What torchrun puts there when it was given no name: then its agent's process tells, our parent.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    told = [sys.executable, "-c", "from falcon_qlora.processes import ranks; print(ranks.launch_id())"]
    twice = [sys.executable, "-c", f"import subprocess; [subprocess.run({told!r}, check=True) for _ in '12']"]
    names = [
        subprocess.run(twice, capture_output=True, text=True, check=True).stdout.splitlines() for _ in "12"
    ]
    assert len(names[0]) == len(names[1]) == 2
    assert names[0][0] == names[0][1] != names[1][0] == names[1][1]


def test_replicas_that_differ_by_little_are_found(tmp_path: Path) -> None:
    script = tmp_path / "replicas.py"
    script.write_text(REPLICAS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*torchrun, script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    changes = ("one value", "exchanged bytes", "1, -2, 1", "the last byte", "byte 65520")
    assert result.stdout.splitlines() == [
        "nothing: the same",
        *(f"{change}: ranks [1] do not match rank 0" for change in changes),
        "nothing again: the same",
    ]


def test_a_file_that_the_system_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert endings.exit_status(lambda: tmp_path.write_text("x")) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"
