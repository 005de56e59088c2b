"""The figures of one run, from its folder alone: no model is loaded and no model code imported."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_qlora.common.untrusted import is_number, of_a_run
from falcon_qlora.run_folder.directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A run to compare, or why it could not run.

    Attributes:
        name: its name in the table; runs of the same name differ in their seed.
        folder: the run directory.
        command: the one that trains this run alone; None if the comparison did not train it.
        reason: why it could not run; None if it did.
    """

    name: str
    folder: Path
    command: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one run; unknown ones are None.

    Attributes:
        base: how the base's weights are stored.
        gpus: number of processes that trained together.
        finished: False if the run was stopped or is still running; its figures are then those so far.
        seconds: time in the training loop, without evaluations and saving.
        tokens_per_second: speed over `seconds`.
        wall_seconds: time of the whole command; unknown for runs of earlier releases.
        wall_tokens_per_second: speed over `wall_seconds`.
        seconds_per_1000_samples: without the first logged interval, in which kernels are compiled.
        time_ratio_to_full: seconds per 1,000 samples, divided by those of full fine-tuning.
        peak_memory_gib: peak of the process that reserved the most.
        total_peak_memory_gib: sum of the peaks of all processes.
        loss: the last training loss in the log.
        eval_loss_before: evaluation loss before the first step.
        eval_loss_after: evaluation loss of what was kept: the last step or the best checkpoint.
        disk_bytes: size of the trained tensors on disk.
    """

    name: str
    seed: int | None = None
    base: str | None = None
    trainable_parameters: int | None = None
    gpus: int | None = None
    steps: int | None = None
    finished: bool = True
    samples: int | None = None
    seconds: float | None = None
    wall_seconds: float | None = None
    tokens_per_second: float | None = None
    wall_tokens_per_second: float | None = None
    seconds_per_1000_samples: float | None = None
    time_ratio_to_full: float | None = None
    peak_memory_gib: float | None = None
    total_peak_memory_gib: float | None = None
    loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    disk_bytes: int | None = None
    reason: str | None = None


def figures(run: Compared) -> Figures:
    """The figures of a run, finished or not.

    Raises:
        UserError: if its files are malformed.
    """
    if run.reason is not None:
        return Figures(name=run.name, reason=run.reason)
    with of_a_run(run.folder):
        directory = RunDirectory(run.folder)
        config, metrics = directory.read_config(), directory.read_metrics()
        finished = directory.summary_file.exists()
        summary = directory.read("summary") if finished else _so_far(directory, metrics)
        known = {
            name: _number(summary.get(name), name)
            for name in (
                "trainable_parameters world_size steps samples tokens tokens_per_second wall_seconds "
                "wall_tokens_per_second peak_memory_gib total_peak_memory_gib final_loss best_eval_loss"
            ).split()
        }
        tokens, samples, speed = known["tokens"], known["samples"], known["tokens_per_second"]
        late_speed = _speed(metrics, after_first=True) or speed
        losses = {line["step"]: line["eval_loss"] for line in metrics if line.get("eval_loss") is not None}
        after = losses.get(max(losses, default=0)) if losses.keys() - {0} else None
        if config.get("load_best_model_at_end") and known["best_eval_loss"] is not None:
            after = known["best_eval_loss"]
        return Figures(
            name=run.name,
            seed=_number(config.get("seed"), "seed"),
            base=str(config["quantize_mode"]),
            trainable_parameters=known["trainable_parameters"],
            gpus=known["world_size"],
            steps=known["steps"],
            finished=finished,
            samples=samples,
            seconds=tokens / speed if tokens and speed else None,
            wall_seconds=known["wall_seconds"],
            tokens_per_second=speed,
            wall_tokens_per_second=known["wall_tokens_per_second"],
            seconds_per_1000_samples=(
                1000 * tokens / samples / late_speed if tokens and samples and late_speed else None
            ),
            peak_memory_gib=known["peak_memory_gib"],
            total_peak_memory_gib=known["total_peak_memory_gib"],
            loss=known["final_loss"],
            eval_loss_before=losses.get(0),
            eval_loss_after=after,
            disk_bytes=sum(file.stat().st_size for file in directory.adapter.glob("*.safetensors")) or None,
        )


def _so_far(directory: RunDirectory, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the log says of a run that has no summary yet."""
    logged = [line for line in metrics if line.get("tokens")]
    if not logged:
        return {}
    environment = directory.read("environment") if (directory.path / "environment.json").exists() else {}
    # Only the main process logs; others may have used more memory.
    peak = max(line.get("peak_memory_gib") or 0 for line in logged) or None
    return {
        "world_size": environment.get("world_size"),
        "steps": logged[-1]["step"],
        "tokens": logged[-1]["tokens"],
        "tokens_per_second": _speed(metrics),
        "peak_memory_gib": peak,
        "total_peak_memory_gib": peak if environment.get("world_size") == 1 else None,
        "final_loss": logged[-1].get("loss"),
    }


def _speed(metrics: Sequence[Mapping[str, Any]], *, after_first: bool = False) -> float | None:
    """Tokens/s over all logged intervals; with `after_first`, without the first if there are others."""
    lines = [{"tokens": 0}, *(line for line in metrics if line.get("tokens_per_second"))]
    intervals = [
        (line["tokens"] - before["tokens"], line["tokens_per_second"])
        for before, line in itertools.pairwise(lines)
    ]
    counted = (after_first and intervals[1:]) or intervals
    seconds = sum(tokens / speed for tokens, speed in counted)
    return sum(tokens for tokens, _ in counted) / seconds if counted else None


def _number(value: Any, name: str) -> Any:
    if value is not None and not is_number(value):
        raise ValueError(f"{name} is no number")
    return value
