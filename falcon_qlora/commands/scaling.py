"""``falcon-qlora bench --gpus 1,2,4,8``: time the real command on several GPUs, row by row."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from falcon_qlora.bench import documents, say, scaling
from falcon_qlora.bench.machine import Machine, environment_of_a_child
from falcon_qlora.bench.scaling import COMMANDS, Measured, Row, Work
from falcon_qlora.bench.tables import append_csv, commands_in_markdown, row_of_command, speed_over_gpus
from falcon_qlora.bench.variants import Mode
from falcon_qlora.commands.bench import BenchArguments, status_of
from falcon_qlora.commands.words import names, numbers
from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.files import temporary_folder
from falcon_qlora.common.quantities import counted
from falcon_qlora.config import Configuration, as_words
from falcon_qlora.config.checks import why_unread
from falcon_qlora.config.verbs import BENCH_SETS

_VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes")
WARMUP = 10
STEPS = 20
# For whole runs.
WHOLE_STEPS = 200
WHOLE_TOKENS = 16384
# Set by each row itself, also if the user gives them.
_SET = frozenset("model_name_or_path quantize_mode max_steps max_length".split())
# Passed on only with the default recipe: others have their own.
_OURS = frozenset({"method", "checkpointing", "kernels"})


def run(configuration: Configuration, models: list[str], whole_runs: Any) -> int:
    """Measure every row in turn; print the table, write the CSV and draw the chart.

    Args:
        configuration: the command's, with `BenchArguments` as `extra`.
        models: those to measure.
        whole_runs: `scaling.whole_runs`, or a replacement.

    Returns:
        The exit status: 0, or 1 where a row broke.
    """
    bench = _Bench(configuration, models)
    with temporary_folder() as folder:
        bench.measure_all(folder, whole_runs)
    bench.finish()
    return status_of([each.failure for each in bench.measured])


class _Bench:
    def __init__(self, configuration: Configuration, models: list[str]):
        self.configuration, self.models = configuration, models
        self.wanted: BenchArguments = configuration.extra
        wanted, given = self.wanted, configuration.explicit
        self.names = names("--variants", wanted.variants or list(COMMANDS))
        for name in self.names:
            if name not in COMMANDS:
                raise UserError(
                    f"--variants: with --gpus there is no {name!r}{nearest(name, COMMANDS)}; there are "
                    f"{', '.join(COMMANDS)}"
                )
        if wanted.whole_run and "cache_dir" in given:
            raise UserError("--whole_run starts with an empty cache: drop --cache_dir")
        assert wanted.gpus is not None
        self.gpus = sorted(numbers("--gpus", wanted.gpus))
        self.modes = names("--quantize_modes", wanted.quantize_modes or [configuration.model.quantize_mode])
        for mode in self.modes:
            if mode not in (known := get_args(Mode)):
                raise UserError(f"--quantize_modes: {mode!r} is not one of {', '.join(known)}")
        tokens, *more = numbers("--tokens", wanted.tokens)
        if more:
            raise UserError("--tokens: with --gpus give one micro-batch size")
        self.work = Work(
            tokens=WHOLE_TOKENS if wanted.whole_run and "tokens" not in given else tokens,
            document=configuration.data.max_length,
            global_tokens=wanted.global_tokens if wanted.fixed == "global" else None,
        )
        self.warmup = WARMUP if wanted.warmup is None else wanted.warmup
        asked = configuration.run.max_steps if "max_steps" in given else None
        # All steps of a whole run count: none is warm-up.
        self.steps = asked or WHOLE_STEPS if wanted.whole_run else self.warmup + (asked or STEPS)
        self.machine = Machine.of(environment_of_a_child(), wanted.commit)
        self.until = math.inf if wanted.minutes is None else time.monotonic() + 60 * wanted.minutes
        self.measured: list[Measured] = []
        # The same command on each GPU alone, in their order.
        self.alone: dict[tuple[str, str, str], list[Measured]] = {}
        self.rows: list[dict[str, Any]] = []

    def measure_all(self, folder: Path, whole_runs: Any) -> None:
        """Measure the rows in turn, until all are done or the minutes are over."""
        planned = list(self._planned(folder))
        if self.wanted.whole_run:
            found = whole_runs(planned, steps=self.steps, warmup=self.warmup, run=self._measure)
        else:
            found = ((self._measure(row, self.steps, self.warmup, {}), "") for row in planned)
        try:
            for measured, note in found:
                self._add(measured, note)
        except _Over:
            say(f"the remaining rows are left out: {self.wanted.minutes:g} minutes are over")

    def _planned(self, folder: Path) -> Iterator[Row]:
        for model in self.models:
            data = self._data(model, folder)
            for mode, name in itertools.product(self.modes, self.names):
                flags = (*data, *self._passed_on(name))
                same = Row(name=name, model=model, quantize_mode=mode, gpus=1, work=self.work, flags=flags)
                if self.wanted.whole_run or self.gpus == [1]:
                    yield from (replace(same, gpus=gpus) for gpus in self.gpus)
                    continue
                # Cards of one machine differ by per cents: several are compared with the same ones alone.
                cards = min(max(self.gpus), self.machine.gpus or max(self.gpus))
                yield from (replace(same, card=card) for card in range(cards))
                yield from (replace(same, gpus=gpus) for gpus in self.gpus if gpus > 1)

    def _data(self, model: str, folder: Path) -> list[str]:
        given = self.configuration.explicit
        own = "cache_dir" in given or self.wanted.whole_run
        cache = [] if own else ["--cache_dir", str(folder / "cache")]
        if "dataset_name" in given:
            return cache
        from falcon_qlora.training.rows import load_tokenizer

        file = folder / f"rows-{len(list(folder.glob('rows-*')))}.jsonl"
        self.configuration.model.model_name_or_path = model
        tokenizer = load_tokenizer(self.configuration.model)
        try:
            documents.write_texts(file, tokenizer, self._lengths(), seed=self.configuration.run.seed)
        except ValueError as error:
            raise UserError(f"{error}; give rows with --dataset_name") from None
        return [*cache, "--dataset_name", str(file), "--dataset_format", "text", "--template", "none"]

    def _lengths(self) -> Any:
        total = self.steps * self.work.step_tokens(max(self.gpus))
        if self.wanted.lengths == "even":
            return [self.work.document] * -(-total // self.work.document)
        longest = self.work.packed
        count = math.ceil(total / documents.uneven_mean(longest))
        return documents.uneven_lengths(count, longest, seed=self.configuration.run.seed)

    def _passed_on(self, name: str) -> list[str]:
        """The settings that the user gave for the runs, as flags."""
        configuration = self.configuration
        given, another = configuration.explicit, COMMANDS[name].recipe is not None
        left_out = _SET | BENCH_SETS | (_OURS if another else frozenset())
        values = vars(configuration.model) | vars(configuration.data) | vars(configuration.run)
        values |= {"method": configuration.method.name, **configuration.method.flags()}
        values |= configuration.trainer
        passed: dict[str, Any] = {} if "logging_steps" in given else {"logging_steps": 1}
        if another and "dataset_name" in given:  # by default the recipe takes only text
            passed |= {"dataset_format": "auto", "template": "auto"}
        for setting, origin in given.items():
            value = values.get(setting)
            if value is None or setting in left_out or why_unread(setting, values) is not None:
                continue
            if not origin.startswith("recipe "):
                passed[setting] = value
        return as_words(passed)

    def _measure(self, row: Row, steps: int, warmup: int, environment: dict[str, str]) -> Measured:
        if time.monotonic() >= self.until:
            raise _Over
        say(
            f"row {len(self.rows) + 1}: {row.model} {row.quantize_mode}, {row.label}, "
            f"{counted(row.gpus, 'GPU') if row.card is None else f'GPU {row.card} alone'}"
        )
        visible = self.machine.gpus
        if visible and row.gpus > visible:
            return Measured(row=row, failure=f"not run: the GPUs of this machine: {visible}")
        return scaling.measure(row, steps=steps, warmup=warmup, on_gpu=visible > 0, environment=environment)

    def _add(self, measured: Measured, note: str) -> None:
        row = measured.row
        self.measured.append(measured)
        recipe = (row.label, row.model, row.quantize_mode)
        alone = self.alone.setdefault(recipe, [])
        if row.gpus == 1 and measured.failure is None:
            alone.append(measured)
        notes = [self._documents(), *filter(None, [note])]
        made = row_of_command(measured, alone, machine=self.machine, notes=notes)
        self.rows.append(made)
        if self.wanted.csv:
            append_csv(Path(self.wanted.csv), [made])
        said = measured.failure
        if said is None:
            said = f"{made['tokens_per_second']:,} tokens/s, {made['samples_per_second_512']} samples/s"
            said += f", {made['ratio_to_first']}x of one GPU" if alone else ""
            if made["share_of_alone"]:
                said += f", {made['share_of_alone']:.1%} of the same GPUs alone"
        say(f"  {said}; {measured.command_seconds:.1f} s")

    def _documents(self) -> str:
        if "dataset_name" in self.configuration.explicit:
            return f"rows of {', '.join(Path(name).name for name in self.configuration.data.dataset_name)}"
        if self.wanted.lengths == "even":
            return f"documents of {self.work.document} tokens"
        longest = self.work.packed
        mean = documents.uneven_mean(longest)
        return f"uneven documents of {mean:.0f} tokens on average, {longest:,} at most"

    def finish(self) -> None:
        from falcon_qlora.terminal.charts import draw_scaling

        machine = self.machine.gpu + (f", driver {self.machine.driver}" if self.machine.gpus else "")
        runs = (each.kept["environment"]["packages"] for each in self.measured if "environment" in each.kept)
        packages: dict[str, str] = next(runs, {})
        libraries = ", ".join(f"{name} {packages[name]}" for name in _VERSIONS if name in packages)
        caption = "; ".join(part for part in (machine, libraries) if part)
        what = f"{self.work.described()}, {self._documents()}"
        print(commands_in_markdown(self.rows, caption=f"{caption}; {what}."), flush=True)
        if self.wanted.plot:
            draw_scaling(
                speed_over_gpus(self.rows), Path(self.wanted.plot), title=f"{self.machine.gpu}: {what}"
            )


class _Over(Exception):
    """The minutes are over before a row has begun."""
