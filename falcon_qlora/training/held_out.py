"""The held-out text that a model is evaluated on after training."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.untrusted import read_json
from falcon_qlora.config import Configuration
from falcon_qlora.data.selection import is_fraction
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.training import rows

NAME_ANOTHER = "That is the held-out text; --eval_split FILE names another."


@dataclass(frozen=True, kw_only=True)
class HeldOutText:
    """Tokenized documents.

    Attributes:
        dataset: with the columns ``input_ids`` and ``mask``.
        lengths: int64 ``[documents]``, tokens.
        fingerprint: of the documents.
        source: where they come from, for the user.
        is_the_runs_own: whether the run held them out itself.
        notes: what became of the rows, for the user; of a share of rows, which training told, only whether
            some were trained on.
    """

    dataset: Any
    lengths: np.ndarray
    fingerprint: str
    source: str
    is_the_runs_own: bool = False
    notes: tuple[str, ...] = ()

    def told(self, flag: str, most_tokens: int | None) -> list[str]:
        """The notes, with one where the first document alone has more tokens than `flag` says."""
        first = int(self.lengths[0])
        if most_tokens is None or first <= most_tokens:
            return [*self.notes]
        more = f"{flag} {most_tokens:,}: the first document has {first:,} tokens, and is measured whole"
        return [*self.notes, more]


def held_out_text(configuration: Configuration, tokenizer: Any, run: RunDirectory | None) -> HeldOutText:
    """What ``--eval_split`` names, or the run held out; without either, text that comes with the package.

    Raises:
        UserError: for data that cannot be found or read.
    """
    data = configuration.data
    split = data.eval_split
    if split is None:
        return packaged_text(tokenizer, data.max_length)
    try:
        if is_fraction(split):
            corpus = rows.corpora(data, tokenizer, seed=configuration.run.seed)[1]
            source = f"{split} of the rows of {', '.join(data.dataset_name)}"
        else:
            corpus = rows.held_out_alone(data, tokenizer)
            source = f"{split} of {', '.join(data.dataset_name)}" if split.startswith("split:") else split
    except UserError as error:
        raise UserError(*error.lines, NAME_ANOTHER) from None
    used = {standard for use in corpus.sources for standard in use.columns}
    unused = (
        f"--{standard}_column {given}: no such column in {source}, whose own were read"
        for standard, given in data.columns().items()
        if standard not in used
    )
    recorded = data_record(run).get("held_out")
    notes = (*rows.what_became(corpus), *unused)
    if is_fraction(split):
        told = f"--eval_split {split}: the run was trained on some of these rows; a FILE there names others"
        notes = (told,) if _were_trained_on(configuration, run) else ()
    return HeldOutText(
        dataset=corpus.dataset,
        lengths=corpus.lengths,
        fingerprint=corpus.fingerprint,
        source=source,
        is_the_runs_own=isinstance(recorded, dict) and recorded.get("fingerprint") == corpus.fingerprint,
        notes=notes,
    )


def _were_trained_on(configuration: Configuration, run: RunDirectory | None) -> bool:
    """Whether rows of the share ``--eval_split`` were trained on: a run's own share holds smaller ones."""
    if run is None:
        return False
    data, was = configuration.data, run.read_config()
    names, theirs = (
        {os.path.abspath(str(name)) for name in each or ()}
        for each in (data.dataset_name, was.get("dataset_name"))
    )
    share = was.get("eval_split")
    share = float(share) if share is not None and is_fraction(str(share)) else 0.0
    is_within = float(str(data.eval_split)) <= share and configuration.run.seed == was.get("seed")
    return bool(names & theirs) and not is_within


def rows_of(configuration: Configuration, tokenizer: Any) -> HeldOutText:
    """All rows that ``--dataset_name`` names."""
    data, seed = configuration.data, configuration.run.seed
    corpus = rows.corpora(data, tokenizer, seed=seed, eval_split=None, use="evaluate on")[0]
    return HeldOutText(
        dataset=corpus.dataset,
        lengths=corpus.lengths,
        fingerprint=corpus.fingerprint,
        source=", ".join(configuration.data.dataset_name),
        notes=tuple(rows.what_became(corpus)),
    )


def packaged_text(tokenizer: Any, max_length: int) -> HeldOutText:
    """English prose and documentation that comes with the package, used if there is no other text."""
    import datasets

    from falcon_qlora.models.tiny import held_out_documents

    pieces: list[list[int]] = []
    for text in (text for texts in held_out_documents().values() for text in texts):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        pieces += [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    masks = [[0, *[1] * (len(piece) - 1)] for piece in pieces]
    return HeldOutText(
        dataset=datasets.Dataset.from_dict({"input_ids": pieces, "mask": masks}),
        lengths=np.array([len(piece) for piece in pieces], dtype=np.int64),
        fingerprint=hashlib.sha256(repr(pieces).encode()).hexdigest(),
        source="text that comes with falcon_qlora (Python's documentation and simple English)",
    )


def data_record(run: RunDirectory | None) -> dict[str, Any]:
    """What a run's data.json says; {} where there is none."""
    return read_json(run.data_file) if run is not None and run.data_file.is_file() else {}
