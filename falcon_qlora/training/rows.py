"""From the settings to what a run trains on: tokenizer, rows, documents, steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import printable
from falcon_qlora.common.quantities import counted
from falcon_qlora.config.arguments import DataArguments, ModelArguments, RunArguments
from falcon_qlora.data.account import Account, nothing_left, told_changed, told_dropped
from falcon_qlora.data.origins import RowNames
from falcon_qlora.data.packing import Plan
from falcon_qlora.data.selection import is_fraction
from falcon_qlora.data.templates import template_fingerprint
from falcon_qlora.methods.interface import Method
from falcon_qlora.processes import agreement, ranks
from falcon_qlora.terminal.console import patience

if TYPE_CHECKING:
    from falcon_qlora.data.batches import Dealing, StreamingSteps, TrainingSteps

_SURVEYED_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        steps: one `Share` an optimizer step, for this process.
        total_steps: optimizer steps of the run.
        epochs: passes over the data in these steps; None for a stream.
        dataset: the tokenized documents, which TRL looks at; for a stream only the first.
        names: of the rows that documents are made of.
        statistics: what became of the rows; None for a stream.
        held_out: the held-out documents, or None.
        record: what data.json says.
        dataset_format: of the rows, as recognised.
        template: that writes them.
        efficiency: mean share of a step's room that real tokens fill; None for a stream or without packing.
        notes: what else happened to the rows, for the terminal.
    """

    steps: TrainingSteps | StreamingSteps
    total_steps: int
    epochs: float | None
    dataset: Any
    names: RowNames
    statistics: Any
    held_out: Any
    record: dict[str, Any]
    dataset_format: str
    template: str
    efficiency: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def plan(self) -> Plan | None:
        """The order of the run; None for a stream."""
        from falcon_qlora.data.batches import TrainingSteps

        return self.steps.plan if isinstance(self.steps, TrainingSteps) else None


def load_tokenizer(model: ModelArguments, method: Method | None = None) -> Any:
    """The tokenizer, with the tokens that a method adds; the main process downloads it."""
    from falcon_qlora.models import tokenizer

    loaded = agreement.main_process_first(
        lambda: tokenizer.load_tokenizer(
            model.model_name_or_path,
            tokenizer_name_or_path=model.tokenizer_name_or_path,
            revision=model.model_revision,
        )
    )
    if method is not None:
        method.add_tokens(loaded)
    return loaded


def corpora(data: DataArguments, tokenizer: Any, *, seed: int, **changes: Any) -> tuple[Any, Any]:
    """The tokenized documents to train on, and those held out or None; from the cache if they are in it.

    Args:
        seed: of the choice of held-out rows.
        changes: arguments of `prepare_corpora` that replace the settings.
    """
    from falcon_qlora.data.corpus import prepare_corpora

    settings = _corpus_settings(data, tokenizer) | {
        "eval_split": data.eval_split,
        "seed": seed,
        "max_rows": data.max_rows,
    }
    return prepare_corpora(**settings | changes)


def _corpus_settings(data: DataArguments, tokenizer: Any) -> dict[str, Any]:
    from falcon_qlora.models.tokenizer import tokenizer_fingerprint

    return row_settings(data) | {
        "tokenizer": tokenizer,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "num_proc": data.dataset_num_proc,
        "cache_dir": Path(data.cache_dir) if data.cache_dir else None,
    }


def make_plan(data: DataArguments, run: RunArguments, corpus: Any) -> Plan:
    """The order of a run over `corpus`."""
    return Plan(
        lengths=corpus.lengths,
        fingerprint=corpus.fingerprint,
        seed=run.seed,
        global_batch=global_batch(run),
        max_length=data.max_length,
        packed=data.packing,
        order=data.train_sampling_strategy,
        draw=corpus.draw,
    )


def training_data(
    data: DataArguments, run: RunArguments, tokenizer: Any, *, together: bool = False
) -> TrainingData:
    """Rows, tokens, and which of them make each step.

    Args:
        together: a forward may need all processes, so each must have as many micro-batches.
    """
    if data.streaming:
        return _streamed_data(data, run, tokenizer, together=together)
    from falcon_qlora.data.batches import DocumentReader, TrainingSteps

    with patience() as doing:
        corpus, held_out = agreement.main_process_first(
            lambda: corpora(data, tokenizer, seed=run.seed, progress=doing)
        )
    plan = make_plan(data, run, corpus)
    total_steps = run.max_steps if run.max_steps > 0 else plan.steps(run.num_train_epochs)
    steps = TrainingSteps(
        DocumentReader(
            corpus.dataset,
            padding=None if data.packing else data.padding,
            max_length=data.max_length,
            padding_id=tokenizer.eos_token_id,
        ),
        plan,
        corpus.target_counts,
        steps=total_steps,
        dealing=_dealing(run, together=together),
    )
    epoch, place = plan.locate(total_steps)
    first_epoch = plan.epoch(0)
    room = len(first_epoch) * plan.global_batch * plan.max_length
    record: dict[str, Any] = {
        "fingerprint": corpus.fingerprint,
        "template_fingerprint": template_fingerprint(corpus.sources[0].template, tokenizer.chat_template),
        **asdict(corpus.statistics),
        "sources": [asdict(use) for use in corpus.sources],
    }
    if held_out is not None:
        record["held_out"] = {"fingerprint": held_out.fingerprint, **asdict(held_out.statistics)}
    return TrainingData(
        steps=steps,
        total_steps=total_steps,
        epochs=epoch + place / len(plan.epoch(epoch)),
        dataset=corpus.dataset,
        names=corpus.names,
        statistics=corpus.statistics,
        held_out=held_out,
        record=record,
        dataset_format=corpus.sources[0].format,
        template=corpus.sources[0].template,
        efficiency=corpus.statistics.tokens / room if data.packing else None,
        notes=_notes(
            [
                *what_became(corpus),
                *_of_held_out(data, held_out),
            ],
            [corpus, held_out],
        ),
    )


def _streamed_data(data: DataArguments, run: RunArguments, tokenizer: Any, *, together: bool) -> TrainingData:
    """Rows that are read as they are needed; held-out rows, being few, are tokenized in advance."""
    import datasets

    from falcon_qlora.data.batches import StreamingSteps
    from falcon_qlora.data.cursor import State
    from falcon_qlora.data.formats import load_template
    from falcon_qlora.data.settings import RowSettings
    from falcon_qlora.data.stream import DocumentStream, recognise_stream, stream_documents
    from falcon_qlora.models.tokenizer import tokenizer_fingerprint

    settings = row_settings(data) | {"max_rows": data.max_rows}

    def documents(
        epoch: int, state: State | None = None, account: Account | None = None, **changes: Any
    ) -> DocumentStream:
        known = {"tokenizer": tokenizer, "seed": run.seed, "epoch": epoch, "state": state, "account": account}
        return stream_documents(**settings | known | changes)

    held_out = None
    if data.eval_split is not None:
        held_out = agreement.main_process_first(lambda: held_out_alone(data, tokenizer))
    rows = RowSettings(**row_settings(data))
    dataset_format, template = agreement.main_process_first(lambda: recognise_stream(rows, tokenizer))
    sources = agreement.from_main_process(
        lambda: [source.describe() | {"notes": source.notes()} for source in rows.sources()]
    )
    limit = min(_SURVEYED_ROWS, data.max_rows or _SURVEYED_ROWS)
    read_as = f"format {dataset_format}, template {template}"
    survey, told = agreement.from_main_process(lambda: _survey(documents, limit, template, data.train_on))
    account = Account()
    first = next(documents(0, None, account, shuffle_buffer=1), None)
    if first is None:
        seen = account.told(template, data.train_on)
        raise nothing_left(data.dataset_name, read_as, account.counts["rows_read"], [account], seen)
    steps = StreamingSteps(
        documents,
        steps=run.max_steps,
        global_batch=global_batch(run),
        max_length=data.max_length,
        padding=None if data.packing else data.padding,
        padding_id=tokenizer.eos_token_id,
        dealing=_dealing(run, together=together),
    )
    return TrainingData(
        steps=steps,
        total_steps=run.max_steps,
        epochs=None,
        dataset=datasets.Dataset.from_list([first]),
        names=RowNames([part for source in rows.sources() for part in source.parts()]),
        statistics=None,
        held_out=held_out,
        record={
            "streaming": True,
            "sources": sources,
            "template": load_template(template, dataset_format, tokenizer).identity,
            "template_fingerprint": template_fingerprint(template, tokenizer.chat_template),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "account": survey,
        },
        dataset_format=dataset_format,
        template=template,
        notes=_notes(
            [
                "streamed: rows are read as they are needed",
                read_as,
                *told,
                *_of_held_out(data, held_out),
                *(["held out: not compared with the rows of the stream"] if held_out else []),
                *(note for source in sources for note in source["notes"]),
            ],
            [held_out],
        ),
    )


def _survey(
    documents: Callable[..., Iterator[Any]], limit: int, template: str, train_on: str
) -> tuple[dict[str, Any], list[str]]:
    """What became of a stream's first rows, for data.json and for the terminal.

    Args:
        documents: opens the stream.
        limit: rows to read.
        template: that writes them.
        train_on: the setting.
    """
    account = Account()
    for _ in documents(0, None, account, shuffle_buffer=1, max_rows=limit, dataset_weights=None):
        pass
    read = account.counts["rows_read"]
    of_rows = f"of {'the first' if read == limit else 'all'} {counted(read, 'row')}: "
    told = [
        *(f"{of_rows}dropped: {each}" for each in told_dropped([account])),
        *(of_rows + line for line in (*told_changed(account.counts), *account.told(template, train_on))),
    ]
    if read == limit:
        told.append(f"what becomes of rows after the first {read:,} is told at the end")
    return {"of_first_rows": read, **account.plain()}, told


def told_at_end(data: TrainingData, plain: dict[str, Any] | None, train_on: str) -> list[str]:
    """What became of the rows that a stream has read until now, in the words of the start.

    Args:
        data: of the run.
        plain: `Share.account` of the last step; None if it was not counted.
        train_on: the setting.
    """
    if plain is None:
        return ["an earlier release began this run: what became of the stream's rows was not counted"]
    account = Account.from_plain(plain)
    used, read = account.counts["rows_read"], account.counts["rows_rendered"]
    in_buffer = f" ({read - used:,} of them wait in the shuffle buffer)" if read > used else ""
    of_used = f"the {counted(used, 'row')}"
    told = [
        *(f"of {of_used} used: dropped: {each}" for each in told_dropped([account])),
        *(f"of {of_used} used: {line}" for line in told_changed(account.counts)),
        *(
            f"of the {counted(read, 'row')} read{in_buffer}: {line}"
            for line in account.told(data.template, train_on)
        ),
    ]
    return [printable(line) for line in told]


def _dealing(run: RunArguments, *, together: bool) -> Dealing:
    from falcon_qlora.data.batches import Dealing

    return Dealing(
        micro_batch=run.per_device_train_batch_size,
        process=ranks.process_index(),
        processes=ranks.world_size(),
        # A forward of sharded weights needs all processes, so each must have as many micro-batches.
        even=together,
    )


def held_out_alone(data: DataArguments, tokenizer: Any) -> Any:
    """The held-out documents, of a file or another split, without tokenizing the training data."""
    from falcon_qlora.data.corpus import prepare_held_out

    assert data.eval_split is not None
    return prepare_held_out(data.eval_split, **_corpus_settings(data, tokenizer))


def _notes(lines: Sequence[str], corpora: Sequence[Any]) -> list[str]:
    """The lines to show, each once, with notes on what was left out of files or read in a special way."""
    of_sources = [note for corpus in corpora if corpus for use in corpus.sources for note in use.notes]
    return [printable(line) for line in dict.fromkeys([*lines, *of_sources])]


def what_became(corpus: Any) -> list[str]:
    """What became of a corpus's rows: how they were read, what of them was not, and what was dropped."""
    dropped = [f"dropped: {each}" for each in corpus.dropped()]
    return [*dropped, *_what_happened(corpus.statistics), *_what_is_said(corpus.sources)]


def _what_happened(statistics: Any) -> list[str]:
    told = {"rows_duplicate": "duplicate", "rows_trained_too": "in the training data as well"}
    counts = [(getattr(statistics, name), what) for name, what in told.items()]
    return [*told_changed(asdict(statistics)), *(f"{count:,} {what}" for count, what in counts if count)]


def _what_is_said(sources: Sequence[Any]) -> list[str]:
    """How the rows were read, and what was not read."""
    lines = dict.fromkeys(use.read_as() for use in sources)
    told = [(use.name, line) for use in sources for line in (use.drawn(), *use.told()) if line]
    return [*lines, *(f"{name}: {line}" if len(sources) > 1 else line for name, line in told)]


def _of_held_out(data: DataArguments, held_out: Any) -> list[str]:
    """What became of held-out rows with a source of their own; others are reported with the training rows."""
    if held_out is None or is_fraction(str(data.eval_split)):
        return []
    return [f"held out: {each}" for each in what_became(held_out)]


def global_batch(run: RunArguments, processes: int | None = None) -> int:
    """Sequences of one optimizer step, over all processes and micro-batches; of this run's, if None."""
    if run.global_batch_size is not None:
        return run.global_batch_size
    processes = ranks.world_size() if processes is None else processes
    return run.per_device_train_batch_size * processes * run.gradient_accumulation_steps


def row_settings(data: DataArguments) -> dict[str, Any]:
    """The settings that decide how rows become documents: arguments of every reader of rows."""
    return {
        "dataset_name": data.dataset_name,
        "dataset_weights": data.dataset_weights,
        "dataset_config": data.dataset_config,
        "dataset_split": data.dataset_train_split,
        "dataset_format": data.dataset_format,
        "columns": data.columns(),
        "template": data.template,
        "train_on": data.train_on,
        "append_end_token": data.append_end_token,
        "overlong": data.overlong,
        "max_length": data.max_length,
    }
