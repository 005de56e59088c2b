"""Runs the real command on several GPUs, and reads speed and memory from the run directories.

Every row of the table is one ``falcon-qlora train … --gpus N`` in a process of its own. Speeds are the run's
own logged ones, without the first steps. The seconds of the whole command, with imports, loading and saving,
are recorded too.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from falcon_qlora.bench import say
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import quoted, temporary_folder
from falcon_qlora.common.fp8 import fp8_excludes
from falcon_qlora.common.quantities import GB, GIB
from falcon_qlora.common.untrusted import of_a_run, read_json
from falcon_qlora.processes import launcher
from falcon_qlora.run_folder.directory import RunDirectory

_PACKED = 2048  # positions of a packed sequence: guanaco's longest documents fit
_REASON_LETTERS = 240
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]:\s*)?[\w.]*(?:Error|Exception|Interrupt)\b")
# Compiled kernels' caches, which a first run leaves for the next beside the tokenized rows.
COMPILED = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash_attention",
    "QUACK_CACHE_DIR": "quack",
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a row runs; ``tests/benchmarks/against.py`` enters the 2023 guide's recipe into `COMMANDS`.

    Attributes:
        what: one-line description.
        flags: of `falcon-qlora train`.
        compute_dtype: what it computes in on a GPU.
        checkpointing: its activation checkpointing where no flag sets it.
        recipe: gives the name of a non-default recipe for a model and a quantization. Such a recipe pads or
            cuts every row to `Work.document` tokens, and has its own method, checkpointing and kernels.
    """

    what: str
    flags: tuple[str, ...] = ()
    compute_dtype: str = "bf16"
    checkpointing: str = "auto"
    recipe: Callable[[str, str], str] | None = None


COMMANDS = {
    "ours": Command(what="the default recipe"),
    "ours-fp8": Command(
        what="the default recipe with --compute_dtype fp8",
        flags=("--compute_dtype", "fp8"),
        compute_dtype="fp8",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much a step computes.

    Attributes:
        tokens: of a micro-batch on each GPU.
        document: tokens that a non-default recipe pads or cuts every row to.
        global_tokens: of a step over all GPUs; None means one micro-batch on each.
    """

    tokens: int = 8192
    document: int = 512
    global_tokens: int | None = None

    def __post_init__(self) -> None:
        for positions in (self.document, self.packed):
            for flag, tokens in (("--tokens", self.tokens), ("--global_tokens", self.global_tokens)):
                if tokens is not None and (tokens < positions or tokens % positions):
                    raise UserError(
                        f"{flag} {tokens}: must be a multiple of {positions}, the positions of a sequence"
                    )

    @property
    def packed(self) -> int:
        """Positions of one packed sequence, which is longer because documents share it."""
        return max(self.document, min(_PACKED, self.tokens))

    def step_tokens(self, gpus: int) -> int:
        return self.global_tokens or gpus * self.tokens

    def flags(self, positions: int) -> list[str]:
        """Flags of `falcon-qlora train` for this work, in sequences of `positions` positions."""
        words = ["--max_length", str(positions), "-b", str(self.tokens // positions)]
        if self.global_tokens is not None:
            words += ["--global_batch_size", str(self.global_tokens // positions)]
        return words

    def described(self) -> str:
        step = "work a GPU fixed" if self.global_tokens is None else f"{self.global_tokens:,} tokens a step"
        return f"{step}, {self.tokens:,} tokens a GPU at a time"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: which command, on how many GPUs.

    Attributes:
        name: which of `COMMANDS`.
        model: as `--model_name_or_path` takes it.
        quantize_mode: of the base.
        gpus: processes, one a GPU.
        card: the only GPU it may use, counted from 0; None: the first `gpus`.
        work: of a step.
        flags: the user's, and those that name the data.
        caches: "cold" or "warm", where a run is timed as a whole.
    """

    name: str
    model: str
    quantize_mode: str
    gpus: int
    work: Work
    flags: tuple[str, ...]
    caches: str = ""
    card: int | None = None

    @property
    def command(self) -> Command:
        return COMMANDS[self.name]

    @property
    def recipe(self) -> str | None:
        """The recipe's name; None for the default one."""
        return self.command.recipe and self.command.recipe(self.model, self.quantize_mode)

    @property
    def label(self) -> str:
        return (self.recipe or self.name) + (f", {self.caches} caches" if self.caches else "")

    def words(self, output: Path, *, steps: int, on_gpu: bool) -> list[str]:
        """The command line after ``falcon-qlora``."""
        words = ["train", "--gpus", str(self.gpus), "-m", self.model, "-q", self.quantize_mode]
        if self.recipe is not None:
            words += ["--recipe", self.recipe]
            # A recipe's fp16 runs only on GPUs.
            words += [] if on_gpu else ["--compute_dtype", "auto"]
        else:  # whose rows are packed
            words += ["--batch_tokens", str(self.work.tokens)]
        positions = self.work.document if self.recipe else self.work.packed
        words += [*self.command.flags, *self.work.flags(positions), "--max_steps", str(steps), *self.flags]
        # A whole run saves as its recipe says. Where only steps are timed, no save may fall between them.
        words += [] if self.caches else ["--save_strategy", "no"]
        return [*words, "--report_to", "none", "--output_dir", str(output)]


@dataclass(kw_only=True)
class Measured:
    """The figures of one command.

    Attributes:
        row: what was run.
        failure: why there are no figures, or None.
        command_seconds: from the command's start to its end.
        steps: all of the run's.
        timed_steps: those after the warm-up.
        tokens_per_second: real tokens, over all GPUs.
        samples_per_second: of 512 computed positions, over all GPUs.
        step_seconds: mean of the timed steps.
        step_range: smallest and largest seconds per step of a log interval.
        peak_gb: reserved memory of the rank with the most, in 10^9 bytes.
        kept: environment.json, summary.json, data.json, kernels.json and the last line of metrics.jsonl.
    """

    row: Row
    failure: str | None = None
    command_seconds: float = 0.0
    steps: int = 0
    timed_steps: int = 0
    tokens_per_second: float = 0.0
    samples_per_second: float = 0.0
    step_seconds: float = 0.0
    step_range: tuple[float, float] = (0.0, 0.0)
    peak_gb: float = 0.0
    kept: dict[str, Any] = field(default_factory=dict)


def measure(
    row: Row,
    *,
    steps: int,
    warmup: int,
    on_gpu: bool,
    environment: Mapping[str, str] | None = None,
) -> Measured:
    """Run the command of `row` and read its run directory; where it failed, report the end of its output.

    Args:
        row: what to run.
        steps: optimizer steps, all of them.
        warmup: the first ones, which are not counted.
        on_gpu: whether it runs on GPUs.
        environment: variables set in addition to this process's.
    """
    if not on_gpu and row.command.compute_dtype == "fp8":
        return Measured(row=row, failure=f"not run: {fp8_excludes(device='cpu', capability=None)}")
    with temporary_folder() as folder:
        output = folder / "run"
        command = row.words(output, steps=steps, on_gpu=on_gpu)
        started = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", *launcher.tied("falcon_qlora", *command)],
            env={**os.environ, **({} if row.card is None else _only(row.card)), **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        seconds = time.perf_counter() - started
        if result.returncode:
            say(f"{' '.join(map(quoted, ['falcon-qlora', *command]))}\n{result.stdout[-3000:]}")
            failure = reason(result.returncode, result.stdout)
            return Measured(row=row, failure=failure, command_seconds=seconds)
        with of_a_run(output):
            measured = read_run(row, RunDirectory(output), warmup=warmup)
    measured.command_seconds = seconds
    return measured


def _only(card: int) -> dict[str, str]:
    """The environment in which a program sees this one of the visible GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[card] if visible else str(card)}


def reason(status: int, printed: str) -> str:
    """One line on why a command failed, from what it printed."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    memory = [line for line in lines if "out of memory" in line.lower()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    if memory:
        return f"failed: out of memory: {memory[0]}"[:_REASON_LETTERS]
    said = [*errors[:1], *exceptions[-1:], *lines[-1:], "it said nothing"][0]
    return f"failed: {said} (exit status {status})"[:_REASON_LETTERS]


def read_run(row: Row, directory: RunDirectory, *, warmup: int) -> Measured:
    """The figures of a finished run.

    Args:
        row: what was run.
        directory: of the run.
        warmup: first steps that are not counted. A log interval that begins within them is not counted
            either.
    """
    lines = [line for line in directory.read_metrics() if "tokens_per_second" in line]
    summary = directory.read("summary")
    kept = {
        "summary": summary,
        "environment": directory.read("environment"),
        "data": read_json(directory.data_file),
        "kernels": directory.read("kernels"),
        "last": lines[-1] if lines else {},
    }
    intervals = []
    for earlier, line in itertools.pairwise([{"step": 0, "tokens": 0}, *lines]):
        if earlier["step"] >= warmup:
            tokens = line["tokens"] - earlier["tokens"]
            spent = tokens / line["tokens_per_second"]
            computed = line["samples_per_second_512"] * spent
            intervals.append((line["step"] - earlier["step"], tokens, computed, spent))
    if not intervals:
        return Measured(row=row, failure=f"not measured: no step was logged after the first {warmup}")
    steps, tokens, samples, seconds = (sum(column) for column in zip(*intervals, strict=True))
    each = [interval[3] / interval[0] for interval in intervals]
    return Measured(
        row=row,
        steps=summary["steps"],
        timed_steps=int(steps),
        tokens_per_second=tokens / seconds,
        samples_per_second=samples / seconds,
        step_seconds=seconds / steps,
        step_range=(min(each), max(each)),
        peak_gb=float(summary["peak_memory_gib"]) * GIB / GB,
        kept=kept,
    )


Run = Callable[[Row, int, int, dict[str, str]], Measured]
"""Measures a row: steps, warm-up steps that are not counted, and environment variables to set."""


def whole_runs(rows: Sequence[Row], *, steps: int, warmup: int, run: Run) -> Iterator[tuple[Measured, str]]:
    """Time each row's whole command twice: first with empty caches of its own, then with the filled ones.

    Args:
        rows: what to run.
        steps: optimizer steps, all of them.
        warmup: the first ones, whose speed is not counted.
        run: see `Run`.

    Yields:
        The figures, and a note on them.
    """
    for row in rows:
        with temporary_folder() as folder:
            for caches in ("cold", "warm"):
                cached, variables = with_caches(replace(row, caches=caches), folder)
                measured = run(cached, steps, min(warmup, steps - 1), variables)
                yield measured, "from the command to the adapter on disk, with the recipe's checkpoints"


def with_caches(row: Row, folder: Path) -> tuple[Row, dict[str, str]]:
    """`row` with its tokenized rows cached in `folder`, and variables that cache compiled kernels there."""
    cached = replace(row, flags=(*row.flags, "--cache_dir", str(folder / "rows")))
    return cached, {name: str(folder / place) for name, place in COMPILED.items()}
