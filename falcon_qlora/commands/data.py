"""``falcon-qlora data``: show what the model would see in training with the same flags."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import UserError, printable
from falcon_qlora.common.files import check_writable
from falcon_qlora.common.quantities import counted
from falcon_qlora.common.settings import setting
from falcon_qlora.config import Configuration, parse
from falcon_qlora.processes.watchdog import end_native_code_after
from falcon_qlora.terminal.console import aside, console
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.terminal.output import say_loading

if TYPE_CHECKING:
    import numpy as np
    from rich.console import RenderableType

    _Look = tuple[list[tuple[Any, Any]], list[RenderableType], np.ndarray, str]

# Documents looked at in a stream, which may have no end.
_STREAMED_DOCUMENTS = 1000
_PICTURES = Path("runs") / "data"


@dataclass(kw_only=True)
class DataReportArguments:
    """What to show."""

    _argument_group_name = "Report"

    show: int = setting(3, "How many documents to show in full.", least=0)
    png: str | None = setting(None, "File for the picture of lengths; unset: a new one under runs/data/.")


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    configuration = parse(argv, verb="data", extra_arguments=DataReportArguments)
    wanted: DataReportArguments = configuration.extra
    check_writable(Path(wanted.png) if wanted.png else _PICTURES / "lengths.png", "--png")
    # Only now, so that a wrong flag is reported at once.
    end_native_code_after(configuration.run.hang_minutes)
    say_loading()
    quiet_libraries()
    from falcon_qlora.commands.first_look import look_at_rows

    look_at_rows(configuration.data, configuration.data.eval_split)
    from falcon_qlora.data import report
    from falcon_qlora.training import start_adapter
    from falcon_qlora.training.rows import load_tokenizer

    with aside():
        start_adapter.adopt(configuration)
    tokenizer = load_tokenizer(configuration.model, configuration.method)
    look = _look_at_stream if configuration.data.streaming else _look_at_corpora
    documents, told, lengths, name = look(configuration, tokenizer)
    told += _told_beyond_positions(configuration)
    out = console()
    out.print(report.preview(documents, tokenizer, color=out.is_terminal and not out.no_color))
    for part in told:
        out.print()
        out.print(part)
    out.print()
    out.print(report.histogram_text(lengths))
    file = Path(wanted.png) if wanted.png else _PICTURES / f"{name}.png"
    title = ", ".join(Path(each).name or each for each in configuration.data.dataset_name)
    report.draw_histogram(lengths, configuration.data.max_length, file, title=title)
    out.print(f"\nwrote {printable(str(file))}", soft_wrap=True)
    return 0


def _told_beyond_positions(configuration: Configuration) -> list[RenderableType]:
    """As the start of a run says it, if this machine has the model's configuration."""
    from rich.text import Text

    from falcon_qlora.models.layouts import layout_of
    from falcon_qlora.models.locate import find_outline_here

    model, longest = configuration.model, configuration.data.max_length
    try:
        config = find_outline_here(model.model_name_or_path, revision=model.model_revision)
    except UserError:  # rows need a tokenizer only
        return []
    told = layout_of(config).told_beyond_positions(longest, f"--max_length {longest:,}")
    return [Text(f"note: {told}")] if told else []


def _look_at_corpora(configuration: Configuration, tokenizer: Any) -> _Look:
    """Some documents, the tables about all of them, their lengths, and the chart's name."""
    from falcon_qlora.data import report
    from falcon_qlora.data.packing import fill
    from falcon_qlora.training import rows

    data, run = configuration.data, configuration.run
    corpus, held_out = rows.corpora(
        data,
        tokenizer,
        seed=run.seed,
        progress=lambda message: console().print(printable(f"{message} …"), style="dim"),
    )
    shown = [corpus.dataset[index] for index in report.spread(len(corpus.lengths), configuration.extra.show)]
    efficiency = fill(
        rows.make_plan(data, run, corpus),
        micro_batch=run.per_device_train_batch_size,
        padding=None if data.packing else data.padding,
    )
    told: list[RenderableType] = [report.summary(corpus, title="training", efficiency=efficiency)]
    if held_out is not None:
        told.append(report.summary(held_out, title="held out"))
    documents = [(row["input_ids"], row["mask"]) for row in shown]
    return documents, told, corpus.lengths, corpus.fingerprint[:12]


def _look_at_stream(configuration: Configuration, tokenizer: Any) -> _Look:
    import numpy as np

    from falcon_qlora.data import report
    from falcon_qlora.data.account import Account, nothing_left, told_changed, told_dropped
    from falcon_qlora.data.formats import read_as
    from falcon_qlora.data.settings import RowSettings
    from falcon_qlora.data.stream import recognise_source, recognise_stream, stream_documents
    from falcon_qlora.training import rows

    account = Account()
    stream = stream_documents(
        **rows.row_settings(configuration.data),
        tokenizer=tokenizer,
        seed=configuration.run.seed,
        max_rows=configuration.data.max_rows,
        account=account,
    )
    documents = [(each["input_ids"], each["mask"]) for each in itertools.islice(stream, _STREAMED_DOCUMENTS)]
    settings, told = RowSettings(**rows.row_settings(configuration.data)), []
    recognise_stream(settings, tokenizer)  # refuses flags for columns of no data set
    used, templates = dict[str, None](), dict[str, None]()
    for source in settings.sources():
        found = recognise_source(settings, source, tokenizer)
        told.append((source.name, read_as(*found)))
        told += [("note", note) for note in source.notes()]
        used[read_as(*found)], templates[found[-1]] = None, None
    seen, counts = account.told(" or ".join(templates), settings.train_on), account.counts
    if not documents:
        raise nothing_left(settings.dataset_name, "; ".join(used), counts["rows_read"], [account], seen)
    lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
    targets = sum(int(mask[1:].sum()) for _, mask in documents)
    told += [("note", line) for line in seen]
    told.append(("rows read", f"{counts['rows_read']:,}"))
    told.append(("dropped", "; ".join(told_dropped([account])) or "none"))
    told += [("note", line) for line in told_changed(counts)]
    told += [("documents", f"{len(documents):,}"), ("tokens", f"{lengths.sum():,}")]
    told.append(("trained tokens", f"{targets:,} ({targets / lengths.sum():.1%})"))
    table = report.labelled(f"the stream's first {counted(len(documents), 'document')}", told)
    return documents[: configuration.extra.show], [table], lengths, "stream"
