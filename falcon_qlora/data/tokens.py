"""Turn rendered rows into token ids and a mask of the tokens that count for the loss.

Prompts and answers are tokenized apart from each other, because in generation the prompt ends there too. A
token is a target if it starts in an answer. The end token follows every answer as an id, not as text. What
`special_text` has marked is tokenized apart, as text.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from falcon_qlora.common.errors import UserError, panics_as_errors
from falcon_qlora.data.account import Account
from falcon_qlora.data.special_text import SpecialText, split, unmarked
from falcon_qlora.data.templates import LACKING, Segment, Template, Turn

# Characters of a prompt's end and of an answer's beginning that show whether the tokenizer would join them.
_BORDER = 24


Part = tuple[str, bool]
"""A text that is tokenized by itself, and whether special tokens spelled in it stay text."""


class Status(enum.IntEnum):
    """What became of a row, or of a piece of a split row."""

    KEPT = 0
    EMPTY = 1  # the row has no answer
    MASKED = 2  # the row has no target token
    OVERLONG = 3  # the row is too long, and overlong is "drop"
    MASKED_PIECE = 4  # this piece of a split row has no target token
    MISSING = 5  # the row lacks a column or text that training needs
    CUT = 6  # the row's target tokens are all lost to the maximum length


# The field of `corpus.Statistics` that counts the dropped rows of each status.
COUNTED = {
    Status.EMPTY: "rows_dropped_empty",
    Status.MISSING: "rows_dropped_missing",
    Status.MASKED: "rows_dropped_masked",
    Status.CUT: "rows_dropped_cut",
    Status.OVERLONG: "rows_dropped_overlong",
}
# What a dropped row's status says, for the user, where its segments do not say more.
_WHY = {
    Status.EMPTY: "empty answer",
    Status.MISSING: "a column or text missing",
    Status.MASKED: "no trained token",
    Status.CUT: "no trained token within --max_length",
    Status.OVERLONG: "longer than --max_length, with --overlong drop",
}


class Change(enum.IntEnum):
    """What was done to a row that was too long."""

    NONE = 0
    TRUNCATED = 1
    SPLIT = 2


@dataclass(frozen=True)
class Document:
    """One document, or a record of why there is none.

    Attributes:
        input_ids: int32 ``[tokens]``; empty unless the status is `Status.KEPT`.
        mask: int8 ``[tokens]``, 1 where the token is a target.
        status: whether it is kept, or why not.
        change: what was done to its row.
        content: a hash of the whole row's tokens and mask; 0 if the row has none.
    """

    input_ids: np.ndarray
    mask: np.ndarray
    status: Status
    change: Change = Change.NONE
    content: int = 0

    @property
    def targets(self) -> int:
        """The number of target tokens; a document's first token is never predicted."""
        return int(self.mask[1:].sum())


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Makes documents of rendered rows.

    Args:
        tokenizer: a fast tokenizer.
        train_on: ``"answers"`` or ``"all"``.
        append_end_token: whether the end token follows every answer.
        overlong: ``"split"``, ``"truncate"`` or ``"drop"``.
        max_length: the most tokens of a document, the end token included.

    Raises:
        UserError: if `max_length` is below 2, or the tokenizer has no end token to append.
    """

    tokenizer: Any
    train_on: str
    append_end_token: bool
    overlong: str
    max_length: int

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(
                f"--max_length {self.max_length}: a sequence needs at least 2 tokens to predict one"
            )
        if self.append_end_token and self.tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end token to append; give it one, or use --append_end_token false"
            )

    def documents(
        self,
        rows: Sequence[list[Segment]],
        account: Account | None = None,
        places: Sequence[str | None] = (),
    ) -> list[list[Document]]:
        """The documents of each row, in order: at least one for every row.

        Args:
            rows: as `rendering.render` returns them.
            account: counts the rows that are dropped, and those in which one token would have spanned prompt
                and answer.
            places: name the rows in the account; rows named None are not counted.
        """
        whole = [[] if row == LACKING else row for row in rows]
        pieces = [self._pieces(row) for row in whole]
        parts = [[_parts(piece) for piece in of_row] for of_row in pieces]
        named = [place for _, place in itertools.zip_longest(rows, places, fillvalue="")]
        if account is not None:
            counted = [part for part, place in zip(parts, named, strict=True) if place is not None]
            account.rows["joined"] += self._joined(counted)
        encoded = iter(self._encode([each for of_row in parts for each in of_row]))
        result = []
        for row, of_row in zip(rows, pieces, strict=True):
            ids, mask = self._assemble(of_row, [next(encoded) for _ in of_row])
            nothing = _none(Status.MISSING if row == LACKING else Status.EMPTY)
            result.append(self._limit(ids, mask) if of_row else [nothing])
        for place, row, documents in zip(named, rows, result, strict=True):
            if account is not None and place is not None:
                _count(account, row, documents, place)
        return result

    def _pieces(self, row: list[Segment]) -> list[list[Segment]]:
        """Split a row's segments at the end tokens that will be appended."""
        pieces: list[list[Segment]] = [[]] if row else []
        for number, segment in enumerate(row, start=1):
            pieces[-1].append(segment)
            if segment.end and self.append_end_token and number < len(row):
                pieces.append([])
        return pieces

    def _encode(self, pieces: list[list[Part]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each piece the token ids, and the character at which each token starts, int ``[tokens]`` both.

        An answer is tokenized apart from what precedes it, as in generation: no token spans the two.
        """
        parts = [part for piece in pieces for part in piece]
        encoded = {
            literal: iter(
                self._tokenize([text for text, is_literal in parts if is_literal == literal], literal)
            )
            for literal in (False, True)
        }
        result = []
        for piece in pieces:
            ids, starts, offset = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], 0
            for text, literal in piece:
                part_ids, part_starts = next(encoded[literal])
                ids.append(part_ids)
                starts.append(part_starts + offset)
                offset += len(text)
            result.append((np.concatenate(ids), np.concatenate(starts)))
        return result

    def _tokenize(self, texts: list[str], literal: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text the token ids, and the character at which each token starts, int ``[tokens]`` both.

        Args:
            texts: to tokenize.
            literal: whether special tokens spelled in a text stay text.
        """
        if not texts:
            return []
        with panics_as_errors(f"tokenizing with {Path(self.tokenizer.name_or_path) / 'tokenizer.json'}"):
            encoded = self.tokenizer(
                texts,
                add_special_tokens=False,
                split_special_tokens=literal,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        return [
            (
                np.asarray(ids, dtype=np.int32),
                _starts(text, np.asarray(offsets, dtype=np.int64).reshape(-1, 2)),
            )
            for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _joined(self, rows: list[list[list[Part]]]) -> int:
        """How many rows would have a token that spans prompt and answer if the two were one text."""
        borders = [
            {
                (before[-_BORDER:], after[:_BORDER])
                for piece in row
                for (before, of_text), (after, to_text) in itertools.pairwise(piece)
                if before and after and not (of_text or to_text)
            }
            for row in rows
        ]
        different = sorted(set().union(*borders))
        encoded = self._tokenize([before + after for before, after in different])
        joined = {
            border
            for border, (_, starts) in zip(different, encoded, strict=True)
            if len(border[0]) not in starts
        }
        return sum(not border.isdisjoint(joined) for border in borders)

    def _assemble(
        self, pieces: list[list[Segment]], encoded: list[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        all_ids, all_masks = [np.zeros(0, np.int32)], [np.zeros(0, np.int8)]
        for piece, (ids, starts) in zip(pieces, encoded, strict=True):
            mask = np.ones(len(ids), np.int8) if self.train_on == "all" else _mask(piece, starts)
            all_ids.append(ids)
            all_masks.append(mask)
            if self.append_end_token and not self._has_its_end(piece):
                last = piece[-1]
                target = self.train_on == "all" or (last.end and last.train)
                all_ids.append(np.array([self.tokenizer.eos_token_id], np.int32))
                all_masks.append(np.array([target], np.int8))
        return np.concatenate(all_ids), np.concatenate(all_masks)

    def _has_its_end(self, piece: list[Segment]) -> bool:
        text = "".join(segment.text for segment in piece).rstrip()
        # A Jinja template or the text itself may spell out the end token. White space that a template writes
        # after the last answer needs no end token either.
        return text.endswith(str(self.tokenizer.eos_token)) or not (text or piece[-1].end)

    def _limit(self, ids: np.ndarray, mask: np.ndarray) -> list[Document]:
        content = _hash(ids, mask)
        if not mask[1:].any():
            return [_none(Status.MASKED, content=content)]
        if len(ids) <= self.max_length:
            return [Document(ids, mask, Status.KEPT, content=content)]
        if self.overlong == "drop":
            return [_none(Status.OVERLONG, content=content)]
        if self.overlong == "truncate":
            ids, mask = ids[: self.max_length], mask[: self.max_length]
            if not mask[1:].any():
                return [_none(Status.CUT, Change.TRUNCATED, content)]
            return [Document(ids, mask, Status.KEPT, Change.TRUNCATED, content)]
        documents = []
        for start in range(0, len(ids), self.max_length):
            part = slice(start, start + self.max_length)
            if mask[part][1:].any():
                documents.append(Document(ids[part], mask[part], Status.KEPT, Change.SPLIT, content))
            else:
                documents.append(_none(Status.MASKED_PIECE, Change.SPLIT, content))
        if all(document.status == Status.MASKED_PIECE for document in documents):
            return [_none(Status.CUT, Change.SPLIT, content)]
        return documents


def prompt_ids(template: Template, turns: Sequence[Turn], tokenizer: Any) -> list[int]:
    """Token ids of a conversation up to where the next answer begins.

    As in training, an end token follows every earlier answer, and answers are tokenized apart from what
    precedes them. Special tokens spelled in a message stay text, except with template ``none``.
    """

    def encoded(part: str) -> list[int]:
        return [
            each
            for text, literal in split(part)
            for each in tokenizer(text, add_special_tokens=False, split_special_tokens=literal)["input_ids"]
        ]

    if template.name != "none":
        special = SpecialText(tokenizer)
        turns = [replace(turn, text=special.mark(turn.text)) for turn in turns]
    turns = template.suited(turns)
    text = template.prompt(turns)
    ids: list[int] = []
    start = end = 0
    for segment in template.segments(turns):
        if segment.end:
            ids += [*encoded(text[start:end]), *encoded(segment.text), tokenizer.eos_token_id]
            start = end + len(segment.text)
        end += len(segment.text)
    return ids + encoded(text[start:])


def _count(account: Account, row: list[Segment], documents: list[Document], place: str) -> None:
    """Count what became of one row."""
    first = documents[0]
    if first.status in _WHY:
        why = "".join(segment.why for segment in row) or _WHY[first.status]
        account.note(account.dropped, why, place)
    elif first.change == Change.TRUNCATED:
        account.counts["rows_truncated"] += 1
    elif first.change == Change.SPLIT:
        account.counts["rows_split"] += 1
        pieces = sum(document.status == Status.MASKED_PIECE for document in documents)
        account.counts["documents_dropped_masked"] += pieces


def _none(status: Status, change: Change = Change.NONE, content: int = 0) -> Document:
    return Document(np.zeros(0, np.int32), np.zeros(0, np.int8), status, change, content)


def _parts(piece: list[Segment]) -> list[Part]:
    """Cut a piece before answers and around text that must stay text; each part is tokenized by itself."""
    texts, train_before = [""], True
    for segment in piece:
        if segment.train and not train_before:
            texts.append("")
        texts[-1] += segment.text
        train_before = segment.train
    return [part for text in texts for part in split(text)]


def _mask(piece: list[Segment], starts: np.ndarray) -> np.ndarray:
    lengths = [len(unmarked(segment.text)) for segment in piece]
    ends = np.cumsum(lengths)
    of_token = np.searchsorted(ends, starts, side="right").clip(max=len(piece) - 1)
    return np.array([segment.train for segment in piece], np.int8)[of_token]


def _starts(text: str, offsets: np.ndarray) -> np.ndarray:
    """Where each token starts, including white space that the tokenizer leaves out of its offsets.

    Many byte-level tokenizers report `` Yes`` as ``Yes``, though the token begins at the space.
    """
    starts = offsets[:, 0].copy()
    before = np.concatenate([[0], np.maximum.accumulate(offsets[:, 1])[:-1]]) if len(offsets) else starts
    for index in np.flatnonzero(starts > before):
        if text[before[index] : starts[index]].isspace():
            starts[index] = before[index]
    return starts


def _hash(ids: np.ndarray, mask: np.ndarray) -> int:
    digest = hashlib.blake2b(ids.tobytes() + mask.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1
