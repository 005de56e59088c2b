"""Times whole commands from outside: the wall clock, and what nvidia-smi shows of each GPU.

    python -m tests.benchmarks.outside --csv tests/benchmarks/records.csv -- -m random:falcon-7b \
        --dataset_name rows.json -b 8 --max_length 2048 --max_steps 40

Behind ``--`` stand the words of ``falcon-qlora train``. The command runs twice, with caches of its own that
are empty and then filled. What the run says of itself is in the row too.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from falcon_qlora.bench.machine import Machine, environment_of_a_child
from falcon_qlora.bench.scaling import COMPILED
from falcon_qlora.bench.tables import append_csv, check_csv, new_row
from falcon_qlora.common.quantities import GB, GIB
from falcon_qlora.common.untrusted import of_a_run
from falcon_qlora.config import parse
from falcon_qlora.processes.devices import FIRST_WITH_BFLOAT16, dtype_name
from falcon_qlora.run_folder.directory import RunDirectory

_READINGS = "--query-gpu=index,utilization.gpu,memory.used"
_QUERY = ["nvidia-smi", _READINGS, "--format=csv,noheader,nounits", "--loop-ms=50"]
_STEP = re.compile(r"step \d+/\d+ ")
_MIB = 2**20


@dataclass(kw_only=True)
class Seen:
    """One command, in seconds from its start.

    Attributes:
        wall: until it ended.
        told: when the line of each step came.
        cards: of each GPU, seconds, per cent busy and MiB used.
    """

    wall: float = 0.0
    told: list[float] = field(default_factory=list)
    cards: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)

    def busy(self) -> list[float]:
        """Of each GPU, the mean per cent between the first step's line and the last one's."""
        within = [
            [busy for at, busy, _ in card if self.told[0] <= at <= self.told[-1]]
            for card in self.cards.values()
        ]
        return [statistics.fmean(seen) for seen in within if seen]

    def card_gib(self) -> float | None:
        """All that the fullest card held at its fullest."""
        return (
            max((used for card in self.cards.values() for *_, used in card), default=0.0) * _MIB / GIB or None
        )


def watch(command: list[str], environment: dict[str, str], gpus: int) -> Seen:
    """Run a command, and see when it tells of its steps and what it does to its GPUs.

    Raises:
        SystemExit: with the end of its output, if it fails.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]
    seen, lines = Seen(), []
    began = time.perf_counter()
    try:
        card = subprocess.Popen([*_QUERY, f"--id={','.join(visible)}"], stdout=subprocess.PIPE, text=True)
    except OSError:
        card = None

    def sample(readings: Any) -> None:
        for line in readings:
            index, busy, used = line.split(",")
            seen.cards.setdefault(index, []).append((time.perf_counter() - began, float(busy), float(used)))

    if card is not None:
        threading.Thread(target=sample, args=[card.stdout], daemon=True).start()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        for line in run.stdout or ():
            lines.append(line)
            if _STEP.match(line):
                seen.told.append(time.perf_counter() - began)
    seen.wall = time.perf_counter() - began
    if card is not None:
        card.terminate()
    if run.returncode:
        raise SystemExit("".join(lines[-30:]))
    return seen


def computed_in(compute_dtype: str, gpus: list[dict[str, Any]]) -> str:
    """What a run with this setting computes in, on the GPUs of its `environment.json`."""
    if compute_dtype != "auto":
        return compute_dtype
    capabilities = [tuple(map(int, gpu["compute_capability"].split("."))) for gpu in gpus]
    bfloat16 = min(capabilities, default=FIRST_WITH_BFLOAT16) >= FIRST_WITH_BFLOAT16
    chosen = dtype_name(compute_dtype, on_gpu=bool(gpus), bfloat16=bfloat16)
    return next(name for name in ("bf16", "fp16", "fp32") if dtype_name(name) == chosen)


def row(seen: Seen, words: list[str], caches: str, folder: RunDirectory, machine: Machine) -> dict[str, Any]:
    """A row of the records, with what the run chose where a setting left it the choice."""
    summary, settings = folder.read("summary"), parse(words)
    steps, speed = summary["steps"], summary["tokens_per_second"]
    wall, said = f"{seen.wall:.1f} s", f"{summary['wall_seconds']:.1f} s"
    lost = [f"{summary[f'{part}_seconds']:.2f} s" for part in ("start", "save", "end")]
    note = [
        f"{caches}; {steps} steps; from outside: {wall}, first step told after {seen.told[0]:.1f} s",
        f"{seen.wall - summary['train_seconds']:.1f} s outside its steps",
        f"the run said {said}, {summary['wall_tokens_per_second']:,.0f} tokens/s over the whole command",
        "start {}, waiting for saves {}, end {}".format(*lost),
    ]
    if busy := seen.busy():
        shares = " and ".join(f"{share:.0f}%" for share in busy)
        note.insert(2, f"GPU busy {shares} from first to last step told")
    if (held := seen.card_gib()) is not None:
        note.append(f"card_gib {held:.2f}")
    as_b = settings.run.per_device_train_batch_size * settings.data.max_length
    return new_row(machine) | {
        "gpus": summary["world_size"],
        "model": settings.model.model_name_or_path,
        "variant": "train, whole command",
        "quantize_mode": settings.model.quantize_mode,
        "compute_dtype": computed_in(settings.model.compute_dtype, folder.read("environment")["gpus"]),
        "checkpointing": summary["checkpointing"],
        "micro_batch_tokens": summary["micro_batch_tokens"] or as_b,
        "tokens_per_second": round(speed),
        "samples_per_second_512": round(summary["samples_per_second_512"], 2),
        "peak_reserved_gb": round(summary["peak_memory_gib"] * GIB / GB, 2),
        "step_ms": round(1e3 * summary["train_seconds"] / steps, 1),
        "note": "; ".join(note),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times a train command from outside, cold and warm.")
    parser.add_argument("--csv", type=Path, help="file of records to append to")
    parser.add_argument("--commit", help="for the record, where this is no checkout")
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU")
    parser.add_argument("words", nargs="+", help="behind --: those of falcon-qlora train")
    wanted = parser.parse_args(arguments)
    if wanted.csv is not None:
        check_csv(wanted.csv)
    machine = Machine.of(environment_of_a_child(), wanted.commit)
    with tempfile.TemporaryDirectory(prefix="falcon_qlora_") as held:
        folder = Path(held)
        environment = os.environ | {name: str(folder / place) for name, place in COMPILED.items()}
        for caches in ("cold", "warm"):
            words = [*wanted.words, "--output_dir", str(folder / caches), "--cache_dir", str(folder / "rows")]
            run = [sys.executable, "-u", "-m", "falcon_qlora", "train", "--gpus", str(wanted.gpus)]
            command = [*run, *words, "--report_to", "none"]
            seen = watch(command, dict(environment), wanted.gpus)
            with of_a_run(folder / caches):
                made = row(seen, words, caches, RunDirectory(folder / caches), machine)
            print(f"{made['tokens_per_second']:,} tokens/s; {made['note']}", flush=True)
            if wanted.csv is not None:
                append_csv(wanted.csv, [made])


if __name__ == "__main__":
    main()
