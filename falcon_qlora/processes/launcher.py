"""What the launcher and its processes share: files in a folder that goes with the launcher, and signals.

Imports no torch: the processes import this before they set up what torch reads when it is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import runpy
from pathlib import Path
from typing import IO

VARIABLE = "FALCON_QLORA_LAUNCHER"
# Files: which process has something to save; the launcher was asked to stop; the run has stopped and saved;
# how to resume after an error; an error was printed; one that is locked while the launcher looks at the rows;
# the native work that did not heed a signal; and the path of a dry run's folder.
TRAINING, STOPPING, STOPPED, GO_ON, TOLD, ROWS = "training", "stopping", "stopped", "go_on", "told", "rows"
NATIVE, DRY_RUN = "native", "dry_run"
# The words of the launcher's command up to the run's own flags, and those after them, as JSON.
LAUNCHED = "FALCON_QLORA_LAUNCHED"
_WORKER = "falcon_qlora.train"
# One request can arrive twice: from a scheduler to every process, and passed on by the launcher; or from a
# terminal, and from a program that supervises the command there.
SAME_REQUEST_SECONDS = 1.0


def tied(module: str, *words: str) -> list[str]:
    """What follows ``python -m`` to run `module` so that the kernel ends it when this process is gone."""
    return ["falcon_qlora.commands.worker", str(os.getpid()), module, *words]


def mark(name: str) -> Path | None:
    """The path of the file `name` in the launcher's folder; None without a launcher."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) / name if folder else None


def leave(name: str, text: str = "") -> None:
    """Leave the file `name` for the launcher, if there is one."""
    file = mark(name)
    if file is not None:
        part = file.with_name(f".{name}-{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk there must not end the run
            part.write_text(text, encoding="utf-8")
            part.rename(file)


def launched(*of_run: str) -> list[str]:
    """The command that launches another run as this one was launched.

    Args:
        of_run: the flags of that run.
    """
    told = os.environ.get(LAUNCHED)
    before, after = json.loads(told) if told else (_found(), [])
    return [*before, *of_run, *after]


def _found() -> list[str]:
    """How this process was started, up to the run's flags, if not by the launcher of this package."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [*_of_torchrun(), "-m", _WORKER]
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return ["srun", "--ntasks", os.environ["WORLD_SIZE"], "python", "-m", _WORKER]
    return ["falcon-qlora", "train"]


def _of_torchrun() -> list[str]:
    """torchrun's own words, as its agent, this process's parent, was given them."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
    except (OSError, UnicodeDecodeError):
        return ["torchrun"]
    ours = next((at for at, word in enumerate(words) if word == _WORKER), 0)
    first = next((at for at, word in enumerate(words) if word.endswith(("torchrun", ".run"))), 0)
    return ["torchrun", *words[first + 1 : ours - 1]] if 0 < first < ours else ["torchrun"]


def hold(file: Path) -> IO[str]:
    """Lock `file` for `wait_for`, until `let_go` or until this process ends; some file systems cannot."""
    held = file.open("w", encoding="utf-8")
    with contextlib.suppress(OSError):
        fcntl.flock(held, fcntl.LOCK_EX)
    return held


def let_go(held: IO[str]) -> None:
    """End `hold`."""
    with held, contextlib.suppress(OSError):
        fcntl.flock(held, fcntl.LOCK_UN)  # closing is not enough where another process inherited it


def wait_for(name: str) -> None:
    """Wait while the launcher holds the file `name` in its folder, where that can be locked."""
    file = mark(name)
    if file is not None and file.exists():
        with file.open(encoding="utf-8") as held, contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_SH)


def visible_gpus() -> int:
    """How many GPUs the driver shows to this process, as CUDA_VISIBLE_DEVICES says.

    Returns:
        0 where there is no driver, or PyTorch is built without CUDA.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return 0
    if runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"] is None:
        return 0
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value
