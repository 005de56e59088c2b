"""Which processes `falcon-qlora train` starts, here and on other nodes: flags and the environment."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from falcon_qlora import config
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import CACHE, try_to_write, user_cache
from falcon_qlora.config.arguments import LaunchArguments
from falcon_qlora.config.parser import refuse
from falcon_qlora.processes import launcher, scheduler

# On these, torchrun's agent ends the workers. The launcher handles the signals that ask a run to stop.
_AGENT_SIGNALS = "SIGHUP,SIGQUIT"


def of_environment(given: dict[str, Any]) -> dict[str, Any]:
    """torchrun's own variables for flags that are not given, such as PET_NNODES; Kubeflow sets them."""
    names = {"nproc_per_node" if name == "gpus" else name: name for name in vars(LaunchArguments())}
    told = {name: os.environ.get(f"PET_{of_torchrun.upper()}") for of_torchrun, name in names.items()}
    if told["gpus"] in ("auto", "gpu", "cpu"):
        del told["gpus"]
    words = [f"--{name}={value}" for name, value in told.items() if value and name not in given]
    return config.read_flags(words, verb="train", extra_arguments=LaunchArguments)


def launched(given: dict[str, Any], launch: LaunchArguments, processes: int) -> str:
    """What `launcher.launched` reads: this command, without the flags of the run."""
    flags = {name: value for name, value in given.items() if hasattr(launch, name)}
    if processes > 1:
        flags["gpus"] = processes
    return json.dumps([["falcon-qlora", "train"], config.as_words(flags)])


def check(launch: LaunchArguments) -> None:
    if launch.nnodes == "1" and scheduler.tasks_of_srun() > 1:
        raise UserError(
            f"srun has started {scheduler.tasks_of_srun()} of this command, and each starts all ranks of its "
            "node. Start one a GPU with `srun python -m falcon_qlora.train`, or one a node with --nnodes"
        )
    counts = launch.nnodes.split(":")
    if len(counts) > 2 or not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise UserError(f"--nnodes: {launch.nnodes!r} is neither a number of nodes nor MIN:MAX")
    if launch.nnodes != "1" and launch.rdzv_endpoint is None and launch.master_addr is None:
        raise UserError(
            f"--nnodes {launch.nnodes}: say where the nodes meet, with --rdzv_backend c10d --rdzv_endpoint "
            "HOST:PORT, or with --master_addr, --master_port and --node_rank"
        )
    several = ("node_rank", "master_port", "rdzv_backend", "rdzv_id", "rdzv_conf", "local_addr")
    refuse(
        [
            f"--{name} is a setting of several nodes, and this run has --nnodes 1: drop it"
            for name in several
            if on_one_node(launch) and getattr(launch, name) is not None
        ]
    )


def on_one_node(launch: LaunchArguments) -> bool:
    return launch.nnodes == "1" and launch.rdzv_endpoint is None and launch.master_addr is None


def processes_of(gpus: int | None) -> int:
    visible = launcher.visible_gpus()
    if visible and gpus is not None and gpus > visible:
        raise UserError(
            f"--gpus {gpus}: this machine shows {visible} (see CUDA_VISIBLE_DEVICES and nvidia-smi)"
        )
    return gpus or visible or 1


def torchrun_flags(launch: LaunchArguments, processes: int) -> list[str]:
    flags = [f"--nproc-per-node={processes}", f"--signals-to-handle={_AGENT_SIGNALS}"]
    given = dataclasses.asdict(launch)
    del given["gpus"]
    if on_one_node(launch):
        # Any free port, and a host name that resolves on every machine.
        given |= {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
        given["rdzv_id"] = launch.rdzv_id or f"falcon-qlora-{secrets.token_hex(8)}"
    return flags + [
        f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None
    ]


def keep_caches_in(folder: Path) -> None:
    """Have what is cached in a home that cannot be written be kept in `folder`, and tell so."""
    try:
        places = {
            "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton",
            CACHE: user_cache("data"),
        }
    except (RuntimeError, UserError):  # no home at all: whoever needs a cache says so
        return
    told = []
    for variable, place in places.items():
        if variable not in os.environ:
            try:
                try_to_write(place)
            except OSError:
                os.environ[variable] = str(folder / place.name.strip("."))
                told.append(str(place))
    if told:
        print(
            f"note: {' and '.join(told)} cannot be written: what is cached there is made anew at each start. "
            "Name other places with TRITON_CACHE_DIR and --cache_dir",
            file=sys.stderr,
        )
