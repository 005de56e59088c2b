"""What a run ran on: `environment.json`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from falcon_qlora.common.errors import without_credentials
from falcon_qlora.common.quantities import GIB
from falcon_qlora.processes import ranks

_PACKAGES = (
    "falcon-qlora",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "deepspeed",
    "datasets",
    "triton",
    "numpy",
    "wandb",
)
# As the last word of a flag: what only has such a word in it counts or names something. A token may also be
# one of text.
_SECRET = re.compile(
    r"(?<!end[_-])(?<!eos[_-])(?<!bos[_-])(?<!pad[_-])(?<!unk[_-])"
    r"(token|secret|passw(or)?d|passphrase|credentials?|(api|access|private|secret)[_-]?key)$",
    re.IGNORECASE,
)
_HIDDEN = "<hidden>"


def collect_environment() -> dict[str, Any]:
    """Versions, devices, commit and command line of this process."""
    return {
        "falcon_qlora": _version("falcon-qlora"),
        "commit": _commit(Path(__file__).parent),
        "command": without_secrets(sys.argv),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "gpus": _gpus(),
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "world_size": ranks.world_size(),
    }


def package_versions() -> dict[str, str]:
    """The versions of what a training uses, by package; those that are not installed are left out."""
    return {name: version for name in _PACKAGES if (version := _version(name))}


def versions() -> dict[str, str]:
    """Versions that a run's figures may depend on, by name: those that this process has."""
    known = {"python": platform.python_version(), "cuda": torch.version.cuda, "driver": _driver()}
    return package_versions() | {name: version for name, version in known.items() if version is not None}


def without_secrets(argv: Sequence[str]) -> list[str]:
    """`argv`, without the values of flags that name a secret, and without credentials in URLs."""
    shown: list[str] = []
    hide = False
    for argument in argv:
        flag, equals, _ = argument.partition("=")
        if hide and not argument.startswith("--"):
            shown.append(_HIDDEN)
            hide = False
            continue
        secret = argument.startswith("--") and bool(_SECRET.search(flag))
        hide = secret and not equals
        shown.append(f"{flag}={_HIDDEN}" if secret and equals else without_credentials(argument))
    return shown


def _driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    try:
        told = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", told)
    return found[1] if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The commit of the checkout that `folder` is in, with ``+changes`` where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        told = subprocess.run(command, capture_output=True, timeout=10, check=True).stdout
        return os.fsdecode(told).strip()  # a path, of any characters

    try:
        # An installed package has no checkout of its own: one around it would be another project's.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.parent.resolve():
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _gpus() -> list[dict[str, Any]]:
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "memory_gib": round(gpu.total_memory / GIB, 2),
            "compute_capability": f"{gpu.major}.{gpu.minor}",
        }
        for gpu in properties
    ]
