"""``falcon-qlora estimate``: what a training would take, from its flags alone.

Memory by part, whether a card holds it, tokens/s and hours: arithmetic on the settings, with the models of
memory and speed that training itself goes by. No GPU, no network and no torch.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import UserError, printable
from falcon_qlora.common.files import check_writable
from falcon_qlora.common.quantities import GIB, counted, duration, passes, sized
from falcon_qlora.common.settings import setting
from falcon_qlora.config import Configuration, parse
from falcon_qlora.processes.watchdog import end_native_code_after
from falcon_qlora.training.cards import CARDS, Card, card_of
from falcon_qlora.training.cuts import as_trained
from falcon_qlora.training.estimate import Estimate, Estimator
from falcon_qlora.training.rows import global_batch
from falcon_qlora.training.sharding import ways_to_hold_less

if TYPE_CHECKING:
    from rich.table import Table

    from falcon_qlora.data.counted import Counted
    from falcon_qlora.models.step_memory import Checkpointing


@dataclass(kw_only=True)
class EstimateArguments:
    """For which card, and how it is told."""

    _argument_group_name = "Estimate"

    gpu: str | None = setting(
        None, f"The card: {', '.join(CARDS)}, or its memory, such as 24GiB; unset: each of them in a line."
    )
    gpus: int = setting(1, "Processes, one a GPU.", least=1)
    table: bool = setting(
        False,
        "Print Markdown: models by methods by quantizations, on each card; of -m, --method, -q and --gpu "
        "only what is given.",
    )
    plot: str | None = setting(None, "With --table: PNG of the memory that each takes, and what cards have.")
    json: bool = setting(False, "Print JSON and nothing else.")


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long a run is.

    Attributes:
        steps: of the optimizer.
        tokens: real ones, over all of them.
        how: what they were counted from.
    """

    steps: int
    tokens: float
    how: str

    def hours(self, tokens_per_second: float | None) -> float | None:
        """In its steps alone."""
        return None if tokens_per_second is None else self.tokens / tokens_per_second / 3600


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    configuration = parse(argv, verb="estimate", extra_arguments=EstimateArguments)
    end_native_code_after(configuration.run.hang_minutes)
    wanted: EstimateArguments = configuration.extra
    if wanted.plot is not None and not wanted.table:
        raise UserError("--plot draws what --table lists: give --table too")
    if wanted.plot is not None:
        check_writable(Path(wanted.plot), "--plot")
    card = None if wanted.gpu is None else card_of(wanted.gpu)
    if wanted.table:
        from falcon_qlora.commands import estimate_table

        return estimate_table.show(configuration, card)
    from falcon_qlora.models.locate import find_outline_here
    from falcon_qlora.terminal.console import aside
    from falcon_qlora.training import start_adapter

    with aside():
        start_adapter.adopt(configuration, find=find_outline_here)
    base = configuration.model
    config = find_outline_here(base.model_name_or_path, revision=base.model_revision)
    rows, problem = _rows(configuration)
    length = _length(configuration, rows, wanted.gpus)
    if problem is not None:
        print(f"note: the rows are not counted: {problem}", file=sys.stderr)
    if configuration.data.dataset_weights:
        print("note: --dataset_weights are not looked at: each row is counted once", file=sys.stderr)
    if length is None:
        print("note: hours are not known; with --max_steps they are", file=sys.stderr)
    estimator = Estimator(configuration, config, processes=wanted.gpus, **_speed_of(configuration, rows))
    if wanted.json:
        print(json.dumps(_record(configuration, estimator, card, length), indent=2))
        return 0
    _tell(configuration, estimator, card, length)
    return 0


def _rows(configuration: Configuration) -> tuple[Counted | None, str | None]:
    """The documents of the rows, where they can be read here; else why not."""
    from falcon_qlora.data.counted import count
    from falcon_qlora.data.settings import RowSettings
    from falcon_qlora.models.tokenizer import tokenizer_fingerprint
    from falcon_qlora.terminal.library_logging import quiet_libraries
    from falcon_qlora.training.rows import row_settings

    data = configuration.data
    if data.streaming:
        return None, "a stream's rows are read as they are needed"
    try:
        settings = RowSettings(**row_settings(data))
        settings.sources()
        quiet_libraries()
        tokenizer = _tokenizer(configuration)
        found = count(
            settings,
            tokenizer,
            tokenizer_fingerprint(tokenizer),
            max_rows=data.max_rows,
            cache_dir=Path(data.cache_dir) if data.cache_dir else None,
        )
    except UserError as error:
        return None, printable(str(error).partition("\n")[0])
    return found, None


def _tokenizer(configuration: Configuration) -> Any:
    """The tokenizer, if it is on this machine.

    Raises:
        UserError: if it is not.
    """
    from falcon_qlora.models.locate import is_on_hub
    from falcon_qlora.models.tokenizer import load_tokenizer, tokenizer_name

    base = configuration.model
    name = tokenizer_name(base.model_name_or_path, base.tokenizer_name_or_path)
    if is_on_hub(name):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "tokenizer.json")
        if not isinstance(cached, str):
            raise UserError(
                f"the tokenizer of {name} is not on this machine, and the hub is not asked; `falcon-qlora "
                "data` with the training's flags fetches it"
            )
        name = str(Path(cached).parent)
    loaded = load_tokenizer(base.model_name_or_path, tokenizer_name_or_path=name)
    configuration.method.add_tokens(loaded)
    return loaded


def _length(configuration: Configuration, rows: Counted | None, processes: int) -> Length | None:
    """How long the run is; None where the rows are not known and no number of steps is given."""
    run, data = configuration.run, configuration.data
    batch = global_batch(run, processes)
    if rows is None:
        if run.max_steps <= 0:
            return None
        tokens = run.max_steps * batch * data.max_length
        return Length(steps=run.max_steps, tokens=tokens, how="full steps, as the rows are not known")
    plan = _plan(configuration, rows, batch)
    trained = 1.0
    with contextlib.suppress(ValueError):  # other rows than these are held out
        trained -= float(data.eval_split or 0)
    of_step = float(rows.lengths.sum()) / len(plan.epoch(0))
    an_epoch = len(plan.epoch(0)) / rows.share * trained
    steps = run.max_steps if run.max_steps > 0 else max(1, math.ceil(an_epoch * run.num_train_epochs))
    return Length(steps=steps, tokens=steps * of_step, how=f"counted from {rows.how}")


def _plan(configuration: Configuration, rows: Counted, batch: int) -> Any:
    from falcon_qlora.data.packing import Plan

    run, data = configuration.run, configuration.data
    return Plan(
        lengths=rows.lengths,
        fingerprint="0",
        seed=run.seed,
        global_batch=batch,
        max_length=data.max_length,
        packed=data.packing,
        order=data.train_sampling_strategy,
    )


def _speed_of(configuration: Configuration, rows: Counted | None) -> dict[str, Any]:
    from falcon_qlora.training.estimate import of_rows

    if rows is None:
        return {}
    batch = configuration.run.per_device_train_batch_size
    return of_rows(configuration, _plan(configuration, rows, batch))


def _record(
    configuration: Configuration, estimator: Estimator, card: Card | None, length: Length | None
) -> dict[str, Any]:
    """All that is known, for programs: GiB, tokens/s and hours; what is not known is None."""
    found = as_trained(estimator, card)
    speed = _speed(found)
    return {
        "model": configuration.model.model_name_or_path,
        "method": configuration.method.describe(),
        "quantize_mode": configuration.model.quantize_mode,
        "gpus": estimator.processes,
        **_on_card(found, length),
        "parts": {name: round(size / GIB, 3) for name, size in found.parts.items()},
        "micro_batch_tokens": found.micro_batch_tokens,
        "micro_batches": found.micro_batches,
        "largest_micro_batch": card and _largest(estimator, card),
        "steps": length and length.steps,
        "tokens": length and round(length.tokens),
        "counted": length and length.how,
        "host_gib": round(found.host_bytes / GIB, 2),
        "work_and_copy_seconds": found.passes and dict(zip(_PASSES, found.passes, strict=True)),
        "basis": None if speed is None else found.basis,
        "cards": None
        if card is not None
        else {each.name: _on_card(there, length) for each, there in _each_card(estimator)},
    }


def _largest(estimator: Estimator, card: Card) -> dict[Checkpointing, int]:
    """The most sequences of a micro batch, by what the blocks keep."""
    return {each: estimator.largest(card, each) for each in estimator.choices(card)}


def _speed(found: Estimate) -> float | None:
    """Tokens/s where it fits, or no card is named."""
    return None if found.fits is False else found.tokens_per_second


def _on_card(found: Estimate, length: Length | None) -> dict[str, Any]:
    speed = _speed(found)
    hours = length and length.hours(speed)
    return {
        "gpu": found.card and found.card.name,
        "usable_gib": found.card and found.card.gib,
        "card_gib": round(found.card_gib, 2),
        "fits": found.fits,
        "checkpointing": found.checkpointing,
        "tokens_per_second": speed and round(speed, 1),
        "hours": hours and round(hours, 4),
    }


def _each_card(estimator: Estimator) -> list[tuple[Card, Estimate]]:
    """Every named card that can compute what is asked for."""
    able = [card for card in CARDS.values() if estimator.why_not_on(card) is None]
    return [(card, as_trained(estimator, card)) for card in able]


def _tell(
    configuration: Configuration, estimator: Estimator, card: Card | None, length: Length | None
) -> None:
    from falcon_qlora.models.layouts import layout_of
    from falcon_qlora.terminal.console import console, print_columns, print_plain

    settings, run, out = configuration.model, configuration.run, console()
    gpus = counted(estimator.processes, "GPU")
    found = as_trained(estimator, card)
    count = layout_of(estimator.config).parameter_count()
    print_plain(f"{settings.model_name_or_path}: {count:,} parameters in {settings.quantize_mode}")
    print_plain(f"{configuration.method.describe()}: {estimator.trainable:,} trained")
    batch = global_batch(run, estimator.processes)
    step = f"{batch} × {configuration.data.max_length:,} tokens a step"
    cut = counted(found.micro_batches, "micro-batch", "micro-batches")
    on = "a GPU" if estimator.processes == 1 else f"each of {gpus}"
    print_plain(f"{step}: {cut} of {found.micro_batch_tokens:,} tokens on {on}")
    if (reason := estimator.reason_on(card)) is not None:
        print_plain(f"on the reference path, which is slower and takes more: {reason}")
    print_plain("")
    out.print(_parts(found))
    if found.host_bytes:
        print_plain(f"CPU memory of each process, page-locked: {sized(found.host_bytes)}")
    print_plain("")
    if card is None:
        print_columns(_cards(estimator, length))
    else:
        _tell_card(estimator, card, found)
    print_plain("")
    if length is not None:
        print_plain(_told_length(run.num_train_epochs if run.max_steps <= 0 else None, length))
    if (speed := _speed(found)) is not None:
        hours = length and length.hours(speed)
        took = f", {duration(3600 * hours)} in the steps" if hours else ""
        print_plain(f"estimated: {speed:,.0f} tokens/s{took}")
    print_plain("memory as on an H200, for which it was fitted; " + (found.basis if card else _BASES))


_PASSES = "forward", "backward"
_BASES = "an H200's speed by its steps, others' by published ceilings and the share of them reached there"


def _told_length(epochs: float | None, length: Length) -> str:
    passed = f" in {passes(epochs)}" if epochs is not None else ""
    return f"{counted(length.steps, 'step')}, {length.tokens:,.0f} tokens{passed}: {length.how}"


def _tell_card(estimator: Estimator, card: Card, found: Estimate) -> None:
    from falcon_qlora.models.step_memory import USABLE_SHARE
    from falcon_qlora.terminal.console import print_columns, print_plain

    has = f"{card.title} ({card.gib:g} GiB usable)"
    largest = _largest(estimator, card)
    if found.fits:
        print_plain(f"fits {has}: {found.card_gib:.1f} GiB, --checkpointing {found.checkpointing}")
    else:
        short = found.card_gib - card.gib
        print_plain(f"does not fit {has}: {found.card_gib:.1f} GiB, {sized(short * GIB, 1)} short")
        if (told := _told_offloaded(estimator, card)) is not None:
            print_plain(told)
    table = _table("largest that fits", "-b", "tokens", "GiB", "tokens/s")
    for what, sequences in largest.items():
        if not sequences:
            table.add_row(f"--checkpointing {what}", "does not fit", "", "", "")
            continue
        there = estimator.on(card, checkpointing=what, sequences=sequences)
        speed = there.tokens_per_second
        table.add_row(
            f"--checkpointing {what}",
            f"{sequences:,}",
            f"{there.micro_batch_tokens:,}",
            f"{there.card_gib:.1f}",
            "" if speed is None else f"{speed:,.0f}",
        )
    print_plain("")
    print_columns(table)
    if any(largest.values()):
        print_plain(
            "These fill the card; --batch_tokens auto and --checkpointing auto leave "
            f"{1 - USABLE_SHARE:.0%} of a step's memory free"
        )
    if found.passes is not None:
        print_plain(_told_copies(found.passes))


def _told_offloaded(estimator: Estimator, card: Card) -> str | None:
    """What ``--offload_base`` comes to on a card that does not hold the run; None where it cannot help."""
    asked, offloaded = estimator.configuration, copy.copy(estimator)
    if "--offload_base" not in ways_to_hold_less(asked):
        return None
    offloaded.configuration = replace(asked, run=replace(asked.run, offload_base=True))
    found = as_trained(offloaded, card)
    if not found.fits:
        return None
    return (
        f"--offload_base fits it: {found.card_gib:.1f} GiB, --checkpointing {found.checkpointing}, and "
        f"{sized(found.host_bytes, 1)} of CPU memory for each GPU"
    )


def _told_copies(passes: tuple[tuple[float, float], tuple[float, float]]) -> str:
    """Whether the copies of an offloaded base limit the speed."""
    told = [
        f"{name} {work:.2f} s of work beside {copied:.2f} s of copies"
        for name, (work, copied) in zip(_PASSES, passes, strict=True)
    ]
    slower = [copied > work for work, copied in passes]
    says = "the copies cost nothing"
    if any(slower):
        says = f"the copies limit {'both passes' if all(slower) else 'one pass'}: a larger -b hides them"
    return f"a micro batch's base from CPU memory: {', '.join(told)}; {says}"


def _cards(estimator: Estimator, length: Length | None) -> Table:
    table = _table("card", "usable GiB", "takes GiB", "tokens/s", "hours", "--checkpointing")
    for card, found in _each_card(estimator):
        hours = length and length.hours(found.tokens_per_second)
        told = ["", "", "does not fit"]
        if found.fits:
            took = "" if not hours else f"{hours:,.1f}" if hours >= 0.05 else "< 0.1"
            told = [f"{found.tokens_per_second:,.0f}", took, found.checkpointing]
        table.add_row(card.title, f"{card.gib:.1f}", f"{found.card_gib:.1f}", *told)
    return table


def _parts(found: Estimate) -> Table:
    table = _table("memory", "GiB")
    for name, size in found.parts.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("all of the card, as nvidia-smi counts it", f"{found.card_gib:.2f}")
    return table


def _table(first: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(show_edge=False)
    table.add_column(first, overflow="fold")
    for name in columns:  # in a narrow terminal no figure is cut
        is_figure = not name.startswith("--")
        table.add_column(name, justify="right" if is_figure else "left", no_wrap=is_figure, overflow="fold")
    return table
