"""The files in launch/: what they start, and what they make of a run that was stopped and saved."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from falcon_qlora import config
from falcon_qlora.config.arguments import LaunchArguments
from tests.integration.forks import Popen
from tests.integration.runs import ENVIRONMENT

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
OURS = '#!/bin/sh\nexec "{python}" -m falcon_qlora "$@"\n'
# What srun does: it passes signals on and ends with the status of its step.
SRUN = """#!/bin/bash
echo "srun $*" >> "$TOLD"
trap 'echo signal >> "$TOLD"; [ "$END" != late ] && exit 75' USR1
touch "$TOLD.ready"
for i in $(seq 100); do sleep 0.1; [ "$END" -eq "$END" ] 2>/dev/null && exit "$END"; done
"""
SCONTROL = """#!/bin/sh
[ "$1" = show ] && printf 'gpu03\\ngpu04\\n' || echo "scontrol $*" >> "$TOLD"
"""


def stand_ins(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which these programs are found first."""
    for name, text in programs.items():
        program = folder / name.replace("_", "-")
        program.write_text(text.replace("{python}", sys.executable))
        program.chmod(0o755)
    of_package = {"PYTHONPATH": str(LAUNCH.parent)}
    return os.environ | ENVIRONMENT | of_package | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_torchrun_sh_starts_and_goes_on(tmp_path: Path) -> None:
    environment = stand_ins(tmp_path, falcon_qlora=OURS)
    words = "-m tiny --dataset_name sample --max_length 64 -b 1 --lora_r 4 --report_to none --logging_steps 1"
    command = [LAUNCH / "torchrun.sh", *words.split(), "--output_dir", "run", "--steps", "2000"]
    stopped = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert stopped.stdout is not None
    assert any(line.startswith("step ") for line in stopped.stdout)
    stopped.terminate()
    output, _ = stopped.communicate(timeout=60)
    step = re.search(r"stopped at step (\d+) of", output)
    assert (stopped.returncode, bool(step)) == (75, True)
    assert step is not None
    command[-1] = str(int(step[1]) + 1)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, f"going on from step {int(step[1]):,}" in done.stdout) == (0, True)


def test_a_home_that_cannot_be_written_is_told_and_trains(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    environment |= ENVIRONMENT | {"HOME": "/proc", "PYTHONPATH": str(LAUNCH.parent)}
    words = "train -m tiny --dataset_name sample --max_length 64 -b 1 --lora_r 4 --report_to none --steps 1"
    command = [sys.executable, "-m", "falcon_qlora", *words.split(), "--output_dir", "run"]
    process = Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    (told,) = errors.splitlines()
    assert told.startswith("note: /proc/.triton and /proc/.cache/falcon_qlora/data cannot be written: ")


def test_torchrun_sh_meets_at_the_first_node(tmp_path: Path) -> None:
    environment = stand_ins(tmp_path, falcon_qlora='#!/bin/sh\nprintf "%s " "$@"\n')
    told = subprocess.check_output(
        [LAUNCH / "torchrun.sh", "-m", "tiny"], env=environment | {"NODES": "2", "FIRST": "a"}, text=True
    )
    meeting = "--nnodes 2 --rdzv_backend c10d --rdzv_endpoint a:29400 --rdzv_id falcon-qlora"
    assert told == f"train {meeting} --resume auto -m tiny "


@pytest.mark.parametrize(
    ("end", "number", "status", "queued"),
    [
        ("0", None, 0, False),
        ("2", None, 2, False),
        ("75", None, 75, True),
        ("asked", signal.SIGUSR1, 75, True),
        ("asked", signal.SIGTERM, 75, True),
    ],
)
def test_slurm_queues_again_what_was_stopped_and_saved(
    tmp_path: Path, end: str, number: int | None, status: int, queued: bool
) -> None:
    told = tmp_path / "told"
    environment = stand_ins(tmp_path, srun=SRUN, scontrol=SCONTROL) | {"TOLD": str(told), "END": end}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_NNODES": "2"}
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "--config", "run.yaml"], env=environment)
    if number is not None:
        while not Path(f"{told}.ready").exists():
            time.sleep(0.02)
        job.send_signal(number)
    assert job.wait(timeout=20) == status
    first, *rest = told.read_text().splitlines()
    words = shlex.split(first)
    assert words[words.index("--rdzv_endpoint") + 1] == "gpu03:29400"
    assert ("scontrol requeue 7" in rest) == queued
    assert ("signal" in rest) == (number is not None)
    parsed(words[words.index("train") + 1 : words.index("--config")])


def parsed(words: list[str]) -> Any:
    """The launch of a command line, as our own parser reads it."""
    given = config.read_flags(words, verb="train", extra_arguments=LaunchArguments)
    assert given["resume"] == "auto"
    assert given["nnodes"] == "2"
    settings = {name for name in given if not hasattr(LaunchArguments(), name)}
    assert settings <= {"resume", "output_dir", "config"}, "settings of a training have no place there"
    return given


def test_the_kubernetes_job_starts_two_nodes() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes-job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"][0] == "train"
    given = parsed(container["args"][1:])
    # The first pod of an indexed job is NAME-0, found below the headless service.
    assert given["rdzv_endpoint"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}:29400"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    rules = {
        tuple(rule["onExitCodes"]["values"]): rule["action"] for rule in _rules(job) if "onExitCodes" in rule
    }
    assert rules == {(75,): "Ignore", (2,): "FailJob"}


def _rules(job: dict[str, Any]) -> list[dict[str, Any]]:
    return job["spec"]["podFailurePolicy"]["rules"]


def test_the_skypilot_job_starts_again_on_75(tmp_path: Path) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    environment = stand_ins(tmp_path, falcon_qlora='#!/bin/sh\nprintf "%s\\n" "$@"\n')
    environment |= {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_TASK_ID": "t",
    }
    words = subprocess.check_output(["bash", "-c", task["run"]], env=environment, text=True).splitlines()
    assert parsed(words[1:])["rdzv_endpoint"] == "10.0.0.1:29400"
