"""Which device a process takes, and that replicas which differ are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from falcon_qlora import distributed

REPLICAS = """
import sys
import torch
import torch.distributed as dist
from falcon_qlora import distributed

dist.init_process_group("gloo")
odd = dist.get_rank() == 1
trained, frozen = torch.arange(100.0), torch.arange(300, dtype=torch.uint8)
if sys.argv[1] == "trained" and odd:
    trained[7] += 1e-6
if sys.argv[1] == "frozen" and odd:
    frozen[[3, 4]] = frozen[[4, 3]]
def check():
    distributed.replicas_hash([trained], frozen=[frozen])
distributed.leave(distributed.exit_status(check))
"""


def test_a_replica_lies_on_the_gpu_of_its_local_index_on_any_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.local_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.local_device() == torch.device("cuda", 1)


@pytest.mark.parametrize("differs", ["nothing", "trained", "frozen"])
def test_replicas_that_differ_by_one_value_are_found(tmp_path: Path, differs: str) -> None:
    script = tmp_path / "replicas.py"
    script.write_text(REPLICAS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*torchrun, script, differs], capture_output=True, text=True, timeout=120)
    if differs == "nothing":
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode == 1
        assert "the replicas differ: processes [1] do not hold what process 0 holds" in result.stderr
