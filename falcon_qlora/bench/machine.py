"""What the machine is, and what its GPU does while something is timed: clock, power and temperature."""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PERIOD_MS = 200
_COLLECT = (
    "import json; from falcon_qlora.run_folder.environment import collect_environment; "
    "print(json.dumps(collect_environment()))"
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What rows were measured on.

    Attributes:
        commit: of this project.
        gpu: its name, or CPU.
        gpus: how many there are.
        driver: its version, or empty.
        torch: PyTorch's version.
    """

    commit: str
    gpu: str
    gpus: int
    driver: str
    torch: str

    @classmethod
    def of(cls, environment: Mapping[str, Any], commit: str | None) -> Machine:
        """From what `collect_environment` finds; a `commit` that is given wins."""
        gpus, driver = environment["gpus"], ""
        if gpus:
            with suppress(OSError, subprocess.SubprocessError):
                query = _command("--query-gpu=driver_version")
                driver = subprocess.check_output(query, stderr=subprocess.DEVNULL, text=True, timeout=60)
        return cls(
            commit=commit or (environment["commit"] or "")[:7],
            gpu=gpus[0]["name"] if gpus else "CPU",
            gpus=len(gpus),
            driver=driver.partition("\n")[0].strip(),
            torch=environment["packages"]["torch"],
        )


@functools.cache
def environment_of_a_child() -> dict[str, Any]:
    """What `collect_environment` finds in a process of its own: a context on the GPUs takes runs' memory."""
    result = subprocess.run([sys.executable, "-c", _COLLECT], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def _command(*words: str) -> list[str]:
    return ["nvidia-smi", "--format=csv,noheader,nounits", *words]


Sample = tuple[float, float, float, float]
"""One reading: seconds of `time.perf_counter`, MHz of the SMs, W, °C."""


class GpuLog:
    """Reads the state of one GPU in the background; on a CPU, or without nvidia-smi, there is nothing."""

    def __init__(self, device: torch.device):
        self._samples: list[Sample] = []
        self._process: subprocess.Popen[str] | None = None
        if device.type != "cuda":
            return
        import torch

        uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
        query = "--query-gpu=clocks.sm,power.draw,temperature.gpu"
        try:
            self._process = subprocess.Popen(
                _command(f"--id=GPU-{uuid}", query, f"--loop-ms={_PERIOD_MS}"),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError:
            return
        threading.Thread(target=self._read, args=[self._process.stdout], daemon=True).start()

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    @contextmanager
    def window(self) -> Iterator[list[Sample]]:
        """Within the block samples are taken; after it they are in the list that was yielded."""
        found: list[Sample] = []
        started = time.perf_counter()
        yield found
        ended = time.perf_counter()
        found += [each for each in self._samples if started <= each[0] <= ended]

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            try:
                clock, power, temperature = (float(part) for part in line.split(","))
            except ValueError:
                continue  # a reading this GPU does not have
            self._samples.append((time.perf_counter(), clock, power, temperature))


def summary(samples: list[Sample]) -> str:
    """The means over all samples, or an empty string."""
    if not samples:
        return ""
    _, clock, power, temperature = map(statistics.fmean, zip(*samples, strict=True))
    return f"SM {clock:.0f} MHz, {power:.0f} W, {temperature:.0f} °C"
