"""How long a base takes to load, and how much memory of its own a process needs for it.

    python -m tests.benchmarks.loading random:falcon3-1b 1b-4bit

loads each in a process of its own, as often as ``--times`` says: from random weights or a 16-bit folder,
which are quantized then, or from what ``falcon-qlora prepare --output_dir`` wrote. The first load of a folder
may read the disk; later ones find it in the file cache. ``own`` is RssAnon, the memory that no file backs, at
its largest and above what it was before the load.
"""

from __future__ import annotations

import argparse
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

GIB = 2**30


def rss_anon() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell RssAnon")


def load(name: str, mode: str | None, compute_dtype: str, told: Any) -> None:
    """Load a base in this process, and tell seconds, the largest RssAnon and that of the loaded model."""
    import torch

    from falcon_qlora.models.load import load_model
    from falcon_qlora.processes import devices

    device = devices.local_device()
    torch.ones(1, device=device)
    load_model("tiny")  # what the first load of a process sets up
    before, largest, done = rss_anon(), 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.02):
            largest = max(largest, rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    model = load_model(name, quantize_mode=mode, compute_dtype=compute_dtype)  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    told.put((seconds, (largest - before) / GIB, (rss_anon() - before) / GIB))
    del model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bases", nargs="+")
    parser.add_argument("--mode", default=None, help="for bases that are not quantized")
    parser.add_argument("--compute_dtype", default="bf16")
    parser.add_argument("--times", type=int, default=2)
    wanted = parser.parse_args()
    start = multiprocessing.get_context("spawn")
    print(f"{'base':50} seconds   own, largest   own, after")
    for name in wanted.bases:
        for _ in range(wanted.times):
            told = start.Queue()
            process = start.Process(target=load, args=(name, wanted.mode, wanted.compute_dtype, told))
            process.start()
            seconds, largest, after = told.get()
            process.join()
            print(f"{name[-50:]:50} {seconds:7.2f} {largest:10.2f} GiB {after:8.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
