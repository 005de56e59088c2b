"""The GPU's SM clock, power and temperature while something is timed, from nvidia-smi."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_PERIOD_MS = 200


@dataclass(frozen=True)
class Sample:
    """One reading: seconds of `time.perf_counter`, MHz, W, °C."""

    at: float
    sm_mhz: float
    watts: float
    celsius: float


class GpuLog:
    """Reads the state of one GPU in the background; on a CPU, or without nvidia-smi, there is nothing.

    Attributes:
        driver: the driver's version, or empty.
    """

    def __init__(self, device: torch.device):
        self.driver = ""
        self._samples: list[Sample] = []
        self._process: subprocess.Popen[str] | None = None
        if device.type != "cuda":
            return
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        command = ["nvidia-smi", f"--id=GPU-{uuid.removeprefix('GPU-')}", "--format=csv,noheader,nounits"]
        try:
            version = subprocess.run(
                [*command, "--query-gpu=driver_version"], capture_output=True, text=True, timeout=30
            )
            self.driver = version.stdout.strip() if version.returncode == 0 else ""
            query = "--query-gpu=clocks.sm,power.draw,temperature.gpu"
            self._process = subprocess.Popen(
                [*command, query, f"--loop-ms={_PERIOD_MS}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except (OSError, subprocess.SubprocessError):
            return
        threading.Thread(target=self._read, daemon=True).start()

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
        found += [each for each in self._samples if started <= each.at <= ended]

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                clock, power, temperature = (float(part) for part in line.split(","))
            except ValueError:
                continue  # a reading this GPU does not have
            self._samples.append(Sample(time.perf_counter(), clock, power, temperature))


def summary(windows: list[list[Sample]]) -> str:
    """The means over all samples, or an empty string."""
    samples = [sample for window in windows for sample in window]
    if not samples:
        return ""
    count = len(samples)
    clock = sum(sample.sm_mhz for sample in samples) / count
    power = sum(sample.watts for sample in samples) / count
    temperature = sum(sample.celsius for sample in samples) / count
    return f"SM {clock:.0f} MHz, {power:.0f} W, {temperature:.0f} °C"
