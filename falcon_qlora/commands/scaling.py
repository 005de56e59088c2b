"""``falcon-qlora bench --gpus 1,2,4,8``: the real command on several GPUs, ours beside the guide's recipe."""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.bench import scaling, texts, whole_run
from falcon_qlora.bench.machine import driver, machine
from falcon_qlora.bench.records import append_csv
from falcon_qlora.bench.scaling import Measured, Row, Work
from falcon_qlora.commands.bench_arguments import BenchArguments, names, numbers, said_of_broken
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.quantities import counted
from falcon_qlora.config import Configuration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


MODES = ("4bit", "8bit", "16bit")
WARMUP = 10
STEPS = 20
# What each row sets by itself, also from these flags,
_SET = frozenset("model_name_or_path quantize_mode max_steps max_length".split())
# and what has no part in it, or would make its figures another recipe's.
_NO_PART = frozenset(
    "recipe compute_dtype per_device_train_batch_size global_batch_size gradient_accumulation_steps "
    "num_train_epochs output_dir resume overwrite report_to save_strategy lora_dropout packing padding "
    "rounds against".split()
)
# Of ours alone: the guide's recipe has its own.
_OURS = frozenset({"method", "checkpointing", "kernels"})


def run(configuration: Configuration, models: list[str], say: Callable[[str], None]) -> int:
    """Measure every row in turn; print the table, keep the CSV and draw the picture.

    Args:
        configuration: of the command, with `BenchArguments` as its own.
        models: to measure.
        say: told the progress.

    Returns:
        The exit status: 0, or 1 where a row broke.
    """
    bench = _Bench(configuration, models, say)
    for name, origin in configuration.explicit.items():
        if origin == "flag" and name in _NO_PART:
            say(f"--{name} has no part with --gpus; the flag changes nothing here")
    with tempfile.TemporaryDirectory(prefix="falcon_qlora_") as folder:
        bench.measure_all(Path(folder))
    bench.finish()
    broken = [each for each in bench.measured if (each.failure or "").startswith("failed:")]
    if broken:
        say(said_of_broken(len(broken)))
    return 1 if broken else 0


class _Bench:
    def __init__(self, configuration: Configuration, models: list[str], say: Callable[[str], None]):
        self.configuration = configuration
        self.wanted: BenchArguments = configuration.extra
        self.models = models
        self.say = say
        variants = self.wanted.variants
        self.names = scaling.choose(None if variants is None else names("--variants", variants))
        _check_whole_run(configuration, self.names)
        assert self.wanted.gpus is not None
        self.gpus = sorted(numbers("--gpus", self.wanted.gpus))
        self.modes = _modes(configuration)
        self.work = _work(configuration)
        self.warmup = WARMUP if self.wanted.warmup is None else self.wanted.warmup
        self.steps = self._steps()
        environment = machine()
        self.visible = len(environment["gpus"])
        self.machine = {
            "commit": self.wanted.commit or (environment["commit"] or "")[:7],
            "gpu": environment["gpus"][0]["name"] if self.visible else "CPU",
            "driver": driver(),
            "torch": environment["packages"]["torch"],
        }
        self.until = math.inf
        if self.wanted.minutes is not None:
            self.until = time.monotonic() + 60 * self.wanted.minutes
        self.measured: list[Measured] = []
        self.rows: list[dict[str, Any]] = []

    def _steps(self) -> int:
        """Of a run; those of a whole run all count."""
        given = "max_steps" in self.configuration.explicit
        if self.wanted.whole_run is not None:
            return self.configuration.run.max_steps if given else whole_run.STEPS
        return self.warmup + (self.configuration.run.max_steps if given else STEPS)

    def measure_all(self, folder: Path) -> None:
        """Measure row after row, until they or the minutes are over."""
        planned = list(self._planned(folder))
        found = self._whole_runs(planned) if self.wanted.whole_run is not None else self._runs(planned)
        try:
            for measured, note in found:
                self._add(measured, note)
        except _Over:
            self.say(f"what follows is not begun, as {self.wanted.minutes:g} minutes are over")

    def _runs(self, planned: list[Row]) -> Iterator[tuple[Measured, str]]:
        for row in planned:
            yield self._measure(row, self.steps, self.warmup, {}), ""

    def _whole_runs(self, planned: list[Row]) -> Iterator[tuple[Measured, str]]:
        assert self.wanted.whole_run is not None
        groups: dict[Any, list[Row]] = {}
        for row in planned:
            groups.setdefault((row.model, row.quantize_mode, row.gpus), []).append(row)
        for rows in groups.values():
            recipe = next((row for row in rows if row.name == "recipe"), None)
            if recipe is not None:
                tokens = whole_run.RECIPE_BATCH * recipe.work.document
                recipe = replace(recipe, work=replace(recipe.work, tokens=tokens))
            yield from whole_run.whole_runs(
                [row for row in rows if row.name != "recipe"],
                recipe,
                steps=self.steps,
                share=self.wanted.whole_run,
                warmup=self.warmup,
                run=self._measure,
            )

    def _planned(self, folder: Path) -> Iterator[Row]:
        for model in self.models:
            data = self._data(model, folder)
            for mode in self.modes:
                for name in self.names:
                    flags = (*data[name == "recipe"], *self._passed_on(name))
                    for gpus in self.gpus:
                        yield Row(
                            name=name, model=model, quantize_mode=mode, gpus=gpus, work=self.work, flags=flags
                        )

    def _data(self, model: str, folder: Path) -> tuple[list[str], list[str]]:
        """The flags for the rows: ours, and those of the guide's recipe, which by itself takes only text."""
        given = self.configuration.explicit
        own = "cache_dir" in given or self.wanted.whole_run is not None
        cache = [] if own else ["--cache_dir", str(folder / "cache")]
        if "dataset_name" in given:
            names = [name for name in ("dataset_format", "template") if name not in given]
            return cache, [*cache, *(word for name in names for word in (f"--{name}", "auto"))]
        file = folder / f"rows-{len(list(folder.glob('rows-*')))}.jsonl"
        lengths = self._lengths()
        tokenizer = _tokenizer(self.configuration, model)
        try:
            texts.write_texts(file, tokenizer, lengths, seed=self.configuration.run.seed)
        except ValueError as error:
            raise UserError(f"{error}; give rows with --dataset_name") from None
        flags = [*cache, "--dataset_name", str(file), "--dataset_format", "text", "--template", "none"]
        return flags, flags

    def _lengths(self) -> Any:
        longest = self.work.sequence("ours")
        total = self.steps * self.work.step_tokens(max(self.gpus))
        if self.wanted.lengths == "even":
            return texts.even_lengths(-(-total // self.work.document), self.work.document)
        mean = texts.UNEVEN_MEAN * longest / texts.UNEVEN_LONGEST
        return texts.uneven_lengths(math.ceil(total / mean), longest, seed=self.configuration.run.seed)

    def _passed_on(self, name: str) -> Iterator[str]:
        """What the user gave for the runs, as flags again."""
        configuration = self.configuration
        groups = (configuration.model, configuration.data, configuration.lora, configuration.run)
        values = {field.name: getattr(group, field.name) for group in groups for field in fields(group)}
        values |= configuration.trainer
        if "logging_steps" not in configuration.explicit:
            yield from ("--logging_steps", "1")
        for setting, origin in configuration.explicit.items():
            unset = origin.startswith("recipe ") or values.get(setting) is None
            if unset or setting in _SET | _NO_PART or (name == "recipe" and setting in _OURS):
                continue
            yield from (f"--{setting}", *_words(values[setting]))

    def _measure(self, row: Row, steps: int, warmup: int, environment: dict[str, str]) -> Measured:
        if time.monotonic() >= self.until:
            raise _Over
        gpus = counted(row.gpus, "GPU")
        self.say(f"row {len(self.rows) + 1}: {row.model} {row.quantize_mode}, {row.label}, {gpus}")
        if self.visible and row.gpus > self.visible:
            return Measured(row=row, failure=f"not run: the GPUs of this machine: {self.visible}")
        on_gpu = self.visible > 0
        return scaling.measure(
            row, steps=steps, warmup=warmup, on_gpu=on_gpu, say=self.say, environment=environment
        )

    def _add(self, measured: Measured, note: str) -> None:
        from falcon_qlora.bench.scaling_table import csv_row

        one = next((each for each in self.measured if _same_on_one_gpu(each, measured)), None)
        if one is None and measured.row.gpus == 1:
            one = measured
        made = csv_row(measured, one, machine=self.machine, notes=[self._documents(), *filter(None, [note])])
        self.measured.append(measured)
        self.rows.append(made)
        if self.wanted.csv:
            append_csv(Path(self.wanted.csv), [made])
        said = measured.failure
        if said is None:
            said = f"{made['tokens_per_second']:,} tokens/s, {made['samples_per_second_512']} samples/s"
            said += f", {made['ratio_to_first']}x of one GPU" if one else ""
        self.say(f"  {said}; {measured.command_seconds:.1f} s")

    def _documents(self) -> str:
        if "dataset_name" in self.configuration.explicit:
            return f"rows of {', '.join(Path(name).name for name in self.configuration.data.dataset_name)}"
        if self.wanted.lengths == "even":
            return f"documents of {self.work.document} tokens"
        mean = texts.UNEVEN_MEAN * self.work.sequence("ours") / texts.UNEVEN_LONGEST
        return f"uneven documents of {mean:.0f} tokens on average, {self.work.sequence('ours'):,} at most"

    def finish(self) -> None:
        from falcon_qlora.bench.scaling_table import markdown, series, versions
        from falcon_qlora.terminal.charts import draw_scaling

        machine = self.machine["gpu"] + (f", driver {self.machine['driver']}" if self.visible else "")
        libraries = ", ".join(f"{name} {version}" for name, version in versions(self.measured).items())
        caption = "; ".join(part for part in (machine, libraries) if part)
        what = f"{self.work.described()}, {self._documents()}"
        print(markdown(self.rows, caption=f"{caption}; {what}."), flush=True)
        if self.wanted.plot:
            draw_scaling(series(self.rows), Path(self.wanted.plot), title=f"{self.machine['gpu']}: {what}")


class _Over(Exception):
    """The minutes are over before a row has begun."""


def _same_on_one_gpu(each: Measured, measured: Measured) -> bool:
    a, b = each.row, measured.row
    same = (a.label, a.model, a.quantize_mode) == (b.label, b.model, b.quantize_mode)
    return same and a.gpus == 1 and each.failure is None


def _check_whole_run(configuration: Configuration, names: Sequence[str]) -> None:
    share = configuration.extra.whole_run
    if share is None:
        return
    if not 0 < share <= 1:
        raise UserError(
            f"--whole_run {share:g}: the share of the recipe's steps to run, above 0 and at most 1"
        )
    if list(names) == ["recipe"]:
        raise UserError("--whole_run: the recipe is run over the rows that ours took; --variants needs ours")
    if "cache_dir" in configuration.explicit:
        raise UserError("--whole_run begins with an empty cache; leave --cache_dir out")


def _work(configuration: Configuration) -> Work:
    wanted: BenchArguments = configuration.extra
    given = configuration.explicit
    sizes = numbers("--tokens", wanted.tokens)
    if wanted.whole_run is not None:
        sizes = sizes if "tokens" in given else [whole_run.TOKENS]
    if len(sizes) > 1:
        raise UserError("--tokens: with --gpus one size of a micro batch, please")
    document = configuration.data.max_length if "max_length" in given else Work.document
    return Work(
        tokens=sizes[0],
        document=document,
        global_tokens=wanted.global_tokens if wanted.fixed == "global" else None,
    )


def _modes(configuration: Configuration) -> list[str]:
    given = configuration.extra.quantize_modes
    if given is None:
        return [configuration.model.quantize_mode]
    modes = names("--quantize_modes", given)
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"--quantize_modes: {mode!r} is not one of {', '.join(MODES)}")
    return modes


def _tokenizer(configuration: Configuration, model: str) -> Any:
    from falcon_qlora.models.tokenizer import load_tokenizer

    settings = configuration.model
    return load_tokenizer(
        model,
        tokenizer_name_or_path=settings.tokenizer_name_or_path,
        revision=settings.model_revision,
    )


def _words(value: Any) -> list[str]:
    """A setting's value as the words of a flag."""
    if isinstance(value, list):
        return [str(item) for item in value]
    if isinstance(value, bool):
        return [str(value).lower()]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]
