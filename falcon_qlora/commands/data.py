"""``falcon-qlora data``: what the model will see, with the flags that would train it."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.settings import setting
from falcon_qlora.config import Configuration, parse
from falcon_qlora.terminal.library_logging import quiet_libraries

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

# Of a stream, which may have no end, so many documents are looked at.
_STREAMED_DOCUMENTS = 1000


@dataclass(kw_only=True)
class DataReportArguments:
    """What to show."""

    _argument_group_name = "Report"

    show: int = setting(3, "How many documents to show in full.", least=0)
    png: str | None = setting(None, "File for the picture of lengths; unset: a new one under runs/data/.")


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    configuration = parse(
        argv,
        extra_arguments=DataReportArguments,
        program="falcon-qlora data",
        description="Show what the model will see: rendered rows, lengths, what is dropped.",
    )
    # Only now: a wrong flag is told at once.
    quiet_libraries()
    from falcon_qlora.terminal.console import console
    from falcon_qlora.training.rows import load_tokenizer

    tokenizer = load_tokenizer(configuration.model)
    if configuration.data.streaming:
        _report_stream(configuration, tokenizer, console())
    else:
        _report_corpora(configuration, tokenizer, console())
    return 0


def _report_corpora(configuration: Configuration, tokenizer: Any, console: Console) -> None:
    from falcon_qlora.data import report
    from falcon_qlora.training import rows

    corpus, held_out = rows.corpora(
        configuration.data,
        tokenizer,
        seed=configuration.run.seed,
        progress=lambda message: console.print(f"{message} …", style="dim", markup=False),
    )
    shown = [corpus.dataset[index] for index in report.spread(len(corpus.lengths), configuration.extra.show)]
    documents = [(row["input_ids"], row["mask"]) for row in shown]
    console.print(report.preview(documents, tokenizer, color=_has_color(console)))
    console.print()
    data, run = configuration.data, configuration.run
    efficiency = report.fill(
        rows.make_plan(data, run, corpus),
        micro_batch=run.per_device_train_batch_size,
        padding=None if data.packing else data.padding,
    )
    console.print(report.summary(corpus, title="training", efficiency=efficiency))
    if held_out is not None:
        console.print()
        console.print(report.summary(held_out, title="held out"))
    _report_lengths(configuration, corpus.lengths, console, name=corpus.fingerprint[:12])


def _report_stream(configuration: Configuration, tokenizer: Any, console: Console) -> None:
    import numpy as np

    from falcon_qlora.data import report
    from falcon_qlora.data.stream import stream_documents
    from falcon_qlora.training import rows

    counts: Counter[str] = Counter()
    stream = stream_documents(
        **rows.row_settings(configuration.data),
        tokenizer=tokenizer,
        seed=configuration.run.seed,
        max_rows=configuration.data.max_rows,
        counts=counts,
    )
    documents = [(each["input_ids"], each["mask"]) for each in itertools.islice(stream, _STREAMED_DOCUMENTS)]
    if not documents:
        raise UserError(
            f"{', '.join(configuration.data.dataset_name)}: nothing is left to train on ({dict(counts)})"
        )
    console.print(report.preview(documents[: configuration.extra.show], tokenizer, color=_has_color(console)))
    lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
    targets = sum(int(mask[1:].sum()) for _, mask in documents)
    tokens = int(lengths.sum())
    console.print(
        f"\nthe stream's first {len(documents):,} documents: {tokens:,} tokens, {targets:,} trained"
    )
    for name, count in counts.items():
        console.print(f"{name.replace('_', ' ')}: {count:,}")
    _report_lengths(configuration, lengths, console, name="stream")


def _report_lengths(
    configuration: Configuration, lengths: np.ndarray, console: Console, *, name: str
) -> None:
    from falcon_qlora.data import report

    wanted: DataReportArguments = configuration.extra

    console.print()
    console.print(report.histogram_text(lengths))
    file = Path(wanted.png) if wanted.png else Path("runs") / "data" / f"{name}.png"
    title = ", ".join(Path(each).name for each in configuration.data.dataset_name)
    try:
        report.draw_histogram(lengths, configuration.data.max_length, file, title=title)
    except OSError as error:
        raise UserError(
            f"{file}: the picture cannot be written ({error.strerror}); name a file with --png"
        ) from None
    console.print(f"\nwrote {file}", soft_wrap=True)


def _has_color(console: Console) -> bool:
    return console.is_terminal and not console.no_color
