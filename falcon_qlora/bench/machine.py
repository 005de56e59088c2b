"""The machine's description, and its GPU's clock, power and temperature during a measurement."""

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
    """The machine that rows were measured on.

    Attributes:
        commit: of this project.
        gpu: name of the GPU, or CPU.
        gpus: number of GPUs.
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
        """From the result of `collect_environment`; `commit` takes precedence where given."""
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
    """`collect_environment` in a child process: a CUDA context here would take the runs' GPU memory."""
    result = subprocess.run([sys.executable, "-c", _COLLECT], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def _command(*words: str) -> list[str]:
    return ["nvidia-smi", "--format=csv,noheader,nounits", *words]


Sample = tuple[float, float, float, float]
"""One reading: seconds of `time.perf_counter`, MHz of the SMs, W, °C."""


class GpuLog:
    """Samples the state of one GPU in the background; no samples on a CPU or without nvidia-smi."""

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
        """Yield a list that holds the samples taken within the block once it has ended."""
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
                continue  # a reading that this GPU does not support
            self._samples.append((time.perf_counter(), clock, power, temperature))


def summary(samples: list[Sample]) -> str:
    """The means over all samples; empty without samples."""
    if not samples:
        return ""
    _, clock, power, temperature = map(statistics.fmean, zip(*samples, strict=True))
    return f"SM {clock:.0f} MHz, {power:.0f} W, {temperature:.0f} °C"
