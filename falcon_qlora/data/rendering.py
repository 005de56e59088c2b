"""Read a row's columns as turns of a conversation, and write these as segments by a template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.account import Account, count
from falcon_qlora.data.conversation import (
    Missing,
    is_unspelled,
    masked_roles,
    parsed,
    text_of,
    tools_of,
    turns_of_history,
    turns_of_messages,
    with_arguments,
    with_system,
)
from falcon_qlora.data.formats import FORMATS, SYSTEM
from falcon_qlora.data.json_rows import listed, numbers_in
from falcon_qlora.data.special_text import SpecialText, clean, is_marked
from falcon_qlora.data.templates import LACKING, REASONING, Segment, Template, Turn, guanaco_segments

# Text that pandas, and so `datasets`, takes for a missing or infinite value in a table. Here it stays text.
_LIKE_MISSING = frozenset(
    "inf|-inf|Infinity|-Infinity|"
    "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan"
    "|null".split("|")
)

_OTHER_FORMAT = (
    "of another format, {}: put the rows of each format into a file of their own, and name all files with "
    "--dataset_name"
)

# What says of an answer that it is good or bad.
_GOOD_OR_BAD = (
    "0 1 -1 0.0 1.0 -1.0 good bad yes no desirable undesirable chosen rejected accepted up down "
    "thumbs_up thumbs_down"
).split()

# A text with messages written out, as tables of text hold lists.
_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(role|from|content|value)"\s*:')

# White space and the marks of `special_text` are not among these.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def render(
    row: Mapping[str, Any],
    dataset_format: str,
    template: Template,
    *,
    columns: Mapping[str, str] | None = None,
    place: str = "a row",
    special: SpecialText | None = None,
    account: Account | None = None,
) -> list[Segment]:
    """Write one row.

    Args:
        row: the columns' values.
        dataset_format: a key of `FORMATS`.
        template: as `formats.load_template` returns it.
        columns: standard column name → its name in the row, for those that differ.
        place: names the row in messages, for example ``data.jsonl:17``.
        special: marks special tokens spelled in the row, so that they stay text under a template.
        account: counts what is not read, is missing or is altered.

    Returns:
        Segments that, laid end to end, are the row's text. They are empty if the row has no answer to learn,
        and equal `LACKING` if it lacks something that training needs.

    Raises:
        UserError: if a value is of a kind that the format cannot take, or the template cannot write it whole.
    """
    account = Account() if account is None else account
    cleaned = clean(dict(row))
    reader = _Reader(cleaned, columns or {}, place, account)
    if cleaned != row:
        reader.saw("surrogates")
    known = FORMATS[dataset_format]
    missing = reader.lacks(known.required)
    fits = [name for name, each in FORMATS.items() if missing and not reader.lacks(each.required)]
    segments = LACKING
    try:
        if dataset_format == "text" and not missing:
            segments = _raw(reader, template, special)
        elif not missing:
            segments = _conversation(reader, dataset_format, template, special)
    except Missing as other:
        missing = [str(other)]
    if fits:
        known = FORMATS[fits[0]]
    if missing:
        segments = _because(_OTHER_FORMAT.format(*fits) if fits else f"lacks {listed(missing)}", LACKING)
        reader.read.update(map(reader.name, (*known.required, *known.optional, *known.also)))
    for name, value in cleaned.items():
        if value is not None and name not in reader.read:
            count(account.columns, name)
    texts = [value for name, value in cleaned.items() if name in reader.read and isinstance(value, str)]
    if not _LIKE_MISSING.isdisjoint(texts):
        reader.saw("like_missing")
    if dataset_format in ("text", "alpaca", "prompt_completion") and any(map(_MESSAGES.match, texts)):
        reader.saw("messages_as_text")
    if any(_CONTROL.search(segment.text) for segment in segments):
        reader.saw("control")
    if any(is_unspelled(value) for name, value in cleaned.items() if name in reader.read):
        reader.saw("unspelled")
    return segments


class _Reader:
    """Reads columns of one row, and records which it has read.

    Args:
        row, columns, place, account: as in `render`.
    """

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str], place: str, account: Account):
        self._row = row
        self._columns = columns
        self.place = place
        self.account = account
        self.read: set[str] = set()

    def name(self, column: str) -> str:
        """A column's name in the data."""
        return self._columns.get(column, column)

    def where(self, column: str) -> str:
        """Names the column in messages."""
        return f"{self.place}: column {self.name(column)}"

    def value(self, column: str) -> Any:
        self.read.add(self.name(column))
        return self.peek(column)

    def peek(self, column: str) -> Any:
        """A column's value, without recording it as read."""
        return self._row.get(self.name(column))

    def lacks(self, columns: Sequence[str]) -> list[str]:
        """Which of these columns have no value, by their names in the data."""
        return [self.name(column) for column in columns if self.peek(column) is None]

    def saw(self, name: str) -> None:
        """Count the row among `Account.rows`."""
        self.account.note(self.account.rows, name, self.place)

    def text(self, column: str) -> str:
        return text_of(self.value(column), self.where(column))

    def messages(self, column: str) -> list[Turn]:
        return turns_of_messages(self.value(column), self.where(column), self.account)

    def optional_text(self, column: str) -> str:
        """A column's text; empty if it has no value."""
        value = self.value(column)
        return "" if value is None else text_of(value, self.where(column))


def _raw(reader: _Reader, template: Template, special: SpecialText | None) -> list[Segment]:
    text = reader.text("text")
    if not text.strip():
        return []
    if special is not None and is_marked(special.mark(text)):
        reader.saw("special_tokens")
    if special is not None:
        text = _ended(text, special)
    if template.name == "guanaco":
        segments = guanaco_segments(text)
        if not any(segment.end for segment in segments):
            return _because("no marker ### Assistant: in the text, by which guanaco finds answers", segments)
        return segments
    return [Segment(text, train=True, end=True)]


def _conversation(
    reader: _Reader, dataset_format: str, template: Template, special: SpecialText | None
) -> list[Segment]:
    tools: list[Any] | None = None
    marked_before = reader.account.marks.total()
    _refuse_kto(reader, dataset_format)
    if dataset_format == "prompt_completion":
        turns = _prompt_and_completion(reader)
    else:
        turns = _alpaca(reader) if dataset_format == "alpaca" else _messages(reader, dataset_format)
        prompts = [reader.optional_text(column) for column in SYSTEM]
        turns = with_system(turns, prompts)
        tools = tools_of(reader.value("tools"), reader.where("tools"))
    if not any(
        turn.role == "assistant" and (turn.text.strip() or turn.held("tool_calls", *REASONING))
        for turn in turns
    ):
        if not any(turn.role == "assistant" for turn in turns):
            raise Missing("a message of the assistant")
        return []
    if reader.account.marks.total() > marked_before:
        reader.saw("marked")
    said = turns
    turns = list(template.suited(turns, tools))
    if turns != said:
        reader.saw("arguments")
    if any(with_arguments(turn, _unparsed) != turn for turn in turns):
        reader.saw("broken_arguments")
    if special is not None:
        if template.name == "none":  # writes the row's text as it is, special tokens included
            if [_marked(turn, special) for turn in turns] != turns:
                reader.saw("special_tokens")
            turns = [replace(turn, text=_ended(turn.text, special)) for turn in turns]
        else:
            plain = [_without_end(turn, special.end) for turn in turns], tools
            turns, tools = [_marked(turn, special) for turn in plain[0]], special.mark(tools)
            if (turns, tools) != plain:
                reader.saw("special_text")
    try:
        unread = template.unread(turns, tools)
        segments = template.segments(turns, tools)
    except UserError as error:
        raise UserError(f"{reader.place}: {error}") from None
    for name in unread:
        count(reader.account.message_keys, name)
    # Searched in single segments, as line breaks that a template writes between them are not the message's.
    texts = [text for turn in turns for text in (turn.text, turn.context)]
    if altered := [text for text in texts if not any(text in segment.text for segment in segments)]:
        packed = ["".join(segment.text.split()) for segment in segments]
        only_space = all(any("".join(text.split()) in each for each in packed) for text in altered)
        reader.saw("altered" if only_space else "rewritten")
    if numbers := list(numbers_in([tools, *(turn.fields for turn in turns)])):
        whole = "".join(segment.text for segment in segments)
        if not all(str(number) in whole for number in numbers):
            reader.saw("respelled")
    if not any(turn.role == "assistant" and turn.train for turn in turns):
        return _because("only answers that are marked as not to be trained, or of the prompt", segments)
    return segments


def _unparsed(arguments: Any) -> Any:
    """None for arguments that are no object, nor the JSON text of one."""
    return arguments if isinstance(parsed(arguments), dict) else None


def _because(why: str, segments: list[Segment]) -> list[Segment]:
    """The segments of a row that is dropped if none of them is trained, with the cause."""
    return [replace(segments[0], why=why), *segments[1:]] if segments else segments


def _alpaca(reader: _Reader) -> list[Turn]:
    return [
        *turns_of_history(reader.value("history"), reader.where("history")),
        Turn("user", reader.text("instruction"), context=reader.optional_text("input")),
        Turn("assistant", reader.text("output")),
    ]


def _refuse_kto(reader: _Reader, dataset_format: str) -> None:
    """Refuse rows that say whether their answer is good or bad.

    Numbers and words in `label` count only beside a prompt and its completion; elsewhere it may label
    anything.
    """
    marks = ["true", "false"]
    if "prompt" in FORMATS[dataset_format].required:
        marks += _GOOD_OR_BAD
    for column, says in (("label", marks), ("kto_tag", (*marks, "0", "1"))):
        value = reader.peek(column)
        if str(value).strip().lower() in says:
            raise UserError(
                f"{reader.where(column)} is {value}: rows of KTO, whose answers are good or bad. "
                "Preferences are not trained here, answers are: put the rows of good answers into a file "
                f"without the column {reader.name(column)}"
            )


def _prompt_and_completion(reader: _Reader) -> list[Turn]:
    return [Turn("user", reader.text("prompt")), Turn("assistant", reader.text("completion"))]


def _messages(reader: _Reader, dataset_format: str) -> list[Turn]:
    *context, column = FORMATS[dataset_format].required
    if isinstance(reader.peek("prompt"), list):
        context = ["prompt"]  # TRL's form: messages before the answers, not learned
    before = [turn for each in context for turn in reader.messages(each)]
    turns = reader.messages(column)
    if not turns:
        raise Missing(f"a message ({reader.name(column)} is an empty list)")
    if turns[: len(before)] == before:  # the column repeats the prompt: it is kept once
        turns = turns[len(before) :]
    turns = [*(replace(turn, train=False) for turn in before), *turns]
    mask = reader.peek("mask")
    masked = None if mask is None else masked_roles(mask, reader.where("mask"))
    if masked is None:
        return turns
    reader.value("mask")
    if "user" not in masked and any(turn.role == "user" for turn in turns):
        count(reader.account.message_keys, "a loss on the user's, which mask asks for")
    reader.account.marks["mask"] += sum(turn.role in masked for turn in turns)
    return [replace(turn, train=turn.train and turn.role not in masked) for turn in turns]


def _ended(text: str, special: SpecialText) -> str:
    """`text` without the white space that follows an end token at its end."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(special.end) else text


def _marked(turn: Turn, special: SpecialText) -> Turn:
    return replace(
        turn,
        text=special.mark(turn.text),
        context=special.mark(turn.context),
        fields=special.mark(turn.fields),
    )


def _without_end(turn: Turn, end_token: str) -> Turn:
    """`turn` without an end token spelled at the end of an answer: every answer gets one anyway."""
    text = turn.text.rstrip()
    if turn.role != "assistant" or not text.endswith(end_token):
        return turn
    return replace(turn, text=text.removesuffix(end_token))
