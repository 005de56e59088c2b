"""What the columns of a row mean: recognised, named, renamed, and read into turns of a conversation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.files import quoted
from falcon_qlora.data.account import Account, count
from falcon_qlora.data.conversation import (
    Missing,
    masked_roles,
    text_of,
    tools_of,
    turns_of_history,
    turns_of_messages,
    with_system,
)
from falcon_qlora.data.json_rows import listed
from falcon_qlora.data.special_text import SpecialText, clean, is_marked
from falcon_qlora.data.templates import (
    LACKING,
    REASONING,
    TOKENIZER,
    Segment,
    Template,
    Turn,
    get_template,
    guanaco_segments,
)

# What pandas, and with it `datasets`, takes for a missing value in a table of text: here it is text.
_LIKE_MISSING = frozenset(
    "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null"
    "".split("|")
)
_SYSTEM = ("system", "system_prompt")
_OF_CHATS = (*_SYSTEM, "tools", "mask")
_OF_ALPACA = (*_SYSTEM, "tools", "history")


@dataclass(frozen=True)
class Format:
    """A way in which a row holds text.

    Attributes:
        required: columns it needs.
        optional: columns it reads where they are there, under a name that a flag may give.
        also: columns it reads where they are there, under these names.
        template: what `--template auto` means for it.
        description: for messages.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    template: str
    description: str
    also: tuple[str, ...] = ()


# In the order in which they are tried: a row with both `messages` and `text` is a chat.
FORMATS: dict[str, Format] = {
    "chat": Format(
        ("messages",), (), "falcon-instruct", "messages: a list of {role, content} or {from, value}"
    ),
    "sharegpt": Format(
        ("conversations",), (), "falcon-instruct", "conversations: a list of {from, value} or {role, content}"
    ),
    "alpaca": Format(
        ("instruction", "output"), ("input",), "alpaca", "instruction and output, perhaps input", _OF_ALPACA
    ),
    "prompt_completion": Format(("prompt", "completion"), (), "none", "prompt and completion"),
    "chat_completion": Format(
        ("prompt", "completion"), (), "falcon-instruct", "prompt and completion: lists of messages", _OF_CHATS
    ),
    "text": Format(("text",), (), "none", "text"),
}

COLUMNS = frozenset(column for each in FORMATS.values() for column in (*each.required, *each.optional))

# Other names that data in the wild has for our columns, to be able to suggest the flag.
_SYNONYMS = {
    "output": ("response", "answer", "target", "label", "completion"),
    "completion": ("response", "answer", "output"),
    "instruction": ("question", "query", "prompt"),
    "prompt": ("question", "query", "instruction", "context"),
    "text": ("content", "document", "body"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
}

_CHATS = ("chat", "sharegpt", "chat_completion")

# What `--template` may say besides a template: the tokenizer's own for chats where it has one, else the
# format's; the format's in any case, as `auto` was in the settings of earlier runs.
AUTO, BY_FORMAT = "auto", "format"


def recognise(
    found: Collection[str],
    *,
    arrays: Collection[str] = (),
    columns: Mapping[str, str],
    dataset_format: str = "auto",
    source: str = "the data",
) -> tuple[str, dict[str, str]]:
    """Which format rows with these columns are in, and which of the renamed columns they have.

    Of several data sets one may have a column under the name that a flag gives, another under its own name.

    Args:
        found: the columns that the data has; none where there is no row.
        arrays: those whose values are arrays.
        columns: standard column name → its name in the data, as the flags give them.
        dataset_format: the user's word for it, or ``"auto"``.
        source: names the data in messages.

    Returns:
        A key of `FORMATS`, and those of `columns` that the data has.

    Raises:
        UserError: if the data is empty, a renamed column is there under neither name, or the columns fit no
            format, or not the one that was named.
    """
    if not found:
        raise UserError(f"{source}: the data is empty, there is no row in it")
    for standard, given in columns.items():
        if given not in found and standard not in found:
            raise UserError(
                f"--{standard}_column {given}: {source} has no such column{nearest(given, found)}; "
                f"it has {listed(found)}"
            )
    renamed = {standard: given for standard, given in columns.items() if given in found}
    missing = {name: _missing(each, found, renamed) for name, each in FORMATS.items()}
    if dataset_format == "auto" and not renamed and {"chosen", "rejected"} <= set(found):
        raise UserError(
            f"{source}: pairs of a chosen and a rejected answer (it has {listed(found)}). Preferences are "
            "not trained here, answers are. To train on the chosen ones, name their column: "
            "--completion_column chosen beside a column prompt, --output_column chosen beside instruction, "
            "--messages_column chosen where they are lists of messages, --text_column chosen where they are "
            "whole texts"
        )
    if dataset_format == "auto":
        fitting = [name for name in FORMATS if not missing[name]]
        # A renamed column says which format is meant where the columns fit several.
        fitting.sort(key=lambda name: not set(FORMATS[name].required) & set(renamed))
        if not fitting:
            needs = "\n".join(f"  {name}: {each.description}" for name, each in FORMATS.items())
            raise UserError(
                f"{source}: the columns fit no format.\nIt has {listed(found)}. The formats need\n{needs}\n"
                "Name your columns with --text_column, --instruction_column, --output_column and so on"
                f"{_suggest(found)}."
            )
        dataset_format = fitting[0]
    elif dataset_format not in FORMATS:
        raise UserError(
            f"--dataset_format {dataset_format}: no such format{nearest(dataset_format, FORMATS)}; "
            f"there are auto, {', '.join(FORMATS)}"
        )
    elif lacking := missing[dataset_format]:
        raise UserError(
            f"{source}: format {dataset_format} needs {FORMATS[dataset_format].description}; "
            f"there is no column {listed(lacking)}. It has {listed(found)}. "
            f"Name the column with --{lacking[0]}_column{_suggest(found, dataset_format)}, or another format "
            "with --dataset_format."
        )
    pair = {renamed.get(column, column) for column in FORMATS["prompt_completion"].required}
    if dataset_format == "prompt_completion" and pair <= set(arrays):
        return "chat_completion", renamed
    return dataset_format, renamed


def resolve_template(template: str, dataset_format: str, tokenizer: Any = None) -> str:
    """The name of the template that `--template` means for rows of this format.

    Args:
        template: as the user gave it.
        dataset_format: a key of `FORMATS`.
        tokenizer: whose own chat template `auto` means for chats, if it has one.

    Raises:
        UserError: if that template cannot write rows of this format.
    """
    if template == AUTO and dataset_format in _CHATS and getattr(tokenizer, "chat_template", None):
        return TOKENIZER
    if template in (AUTO, BY_FORMAT):
        return FORMATS[dataset_format].template
    if dataset_format == "text" and template not in ("none", "guanaco"):
        raise UserError(
            f"--template {template}: rows with only a text have no turns to write with it; use "
            "--template none, or guanaco where the text holds the markers ### Human: and ### Assistant:"
        )
    if template == "none" and dataset_format not in ("text", "prompt_completion"):
        raise UserError(
            f"--template none: rows of format {dataset_format} have no text without a template; "
            f"use --template {FORMATS[dataset_format].template}"
        )
    return template


def load_template(template: str, row_format: str, tokenizer: Any) -> Template:
    """The template that `--template` means for rows of this format, with the tokenizer's special tokens."""
    name = resolve_template(template, row_format, tokenizer)
    return get_template(name, tokenizer.special_tokens_map, tokenizer.chat_template)


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
        template: as `resolve_template` chose it.
        columns: standard column name → its name in the row, for those that differ.
        place: names the row in messages, for example ``data.jsonl:17``.
        special: marks text that reads like a special token, which is to stay text under a template.
        account: gets what is not read, lacking or altered.

    Returns:
        Segments which, laid end to end, are the row's text; none where the row has no answer to learn;
        `LACKING` where it lacks what it cannot be trained without.

    Raises:
        UserError: if a value is not of the kind that the format needs, or the template cannot write it whole.
    """
    account = Account() if account is None else account
    cleaned = clean(dict(row))
    account.rows["surrogates"] += cleaned != row
    reader = _Reader(cleaned, columns or {}, place, account)
    known = FORMATS[dataset_format]
    missing = [reader.name(column) for column in known.required if reader.peek(column) is None]
    segments = LACKING
    try:
        if dataset_format == "text" and not missing:
            segments = _raw(reader, template, special)
        elif not missing:
            segments = _conversation(reader, dataset_format, template, special)
    except Missing as other:
        missing = [str(other)]
    if missing:
        account.missing.update(missing)
        reader.read.update(map(reader.name, (*known.required, *known.optional, *known.also)))
    for name, value in cleaned.items():
        if value is not None and name not in reader.read:
            count(account.columns, name)
    texts = (value for name, value in cleaned.items() if name in reader.read and isinstance(value, str))
    account.rows["like_missing"] += not _LIKE_MISSING.isdisjoint(texts)
    return segments


class _Reader:
    """Reads columns of one row, and knows which it has read.

    Args:
        row, columns, place, account: as `render` takes them.
    """

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str], place: str, account: Account):
        self._row = row
        self._columns = columns
        self.place = place
        self.account = account
        self.read: set[str] = set()

    def name(self, column: str) -> str:
        """What the data calls a column."""
        return self._columns.get(column, column)

    def where(self, column: str) -> str:
        """Names the column in messages."""
        return f"{self.place}: column {self.name(column)}"

    def value(self, column: str) -> Any:
        self.read.add(self.name(column))
        return self.peek(column)

    def peek(self, column: str) -> Any:
        """A value that is not read with this."""
        return self._row.get(self.name(column))

    def text(self, column: str) -> str:
        return text_of(self.value(column), self.where(column))

    def messages(self, column: str) -> list[Turn]:
        return turns_of_messages(self.value(column), self.where(column), self.account.message_keys)

    def optional_text(self, column: str) -> str:
        """A text, empty where there is none."""
        value = self.value(column)
        return "" if value is None else text_of(value, self.where(column))


def _raw(reader: _Reader, template: Template, special: SpecialText | None) -> list[Segment]:
    text = reader.text("text")
    if not text.strip():
        return []
    if special is not None and is_marked(special.mark(text)):
        count(reader.account.rows, "special_tokens")
    if special is not None:
        text = _ended(text, special)
    if template.name == "guanaco":
        return guanaco_segments(text)
    return [Segment(text, train=True, end=True)]


def _conversation(
    reader: _Reader, dataset_format: str, template: Template, special: SpecialText | None
) -> list[Segment]:
    tools: list[Any] | None = None
    _refuse_kto(reader, dataset_format)
    if dataset_format == "prompt_completion":
        turns = _prompt_and_completion(reader)
    else:
        turns = _alpaca(reader) if dataset_format == "alpaca" else _messages(reader, dataset_format)
        prompts = [reader.optional_text(column) for column in _SYSTEM]
        turns = with_system(turns, prompts)
        tools = tools_of(reader.value("tools"), reader.where("tools"))
    if not any(
        turn.role == "assistant" and (turn.text.strip() or turn.held("tool_calls", *REASONING))
        for turn in turns
    ):
        return []
    rows = reader.account.rows
    if special is not None:
        if template.name == "none":  # which writes what the row says as it is, its special tokens too
            rows["special_tokens"] += [_marked(turn, special) for turn in turns] != turns
            turns = [replace(turn, text=_ended(turn.text, special)) for turn in turns]
        else:
            plain = [_without_end(turn, special.end) for turn in turns], tools
            turns, tools = [_marked(turn, special) for turn in plain[0]], special.mark(tools)
            rows["special_text"] += (turns, tools) != plain
    try:
        unread = template.unread(turns, tools)
        segments = template.segments(turns, tools)
    except UserError as error:
        raise UserError(f"{reader.place}: {error}") from None
    for name in unread:
        count(reader.account.message_keys, name)
    # Within a segment: a template's own line breaks after a message are none of it.
    said = (text for turn in turns for text in (turn.text, turn.context))
    rows["altered"] += not all(any(text in segment.text for segment in segments) for text in said)
    return segments


def _alpaca(reader: _Reader) -> list[Turn]:
    return [
        *turns_of_history(reader.value("history"), reader.where("history")),
        Turn("user", reader.text("instruction"), context=reader.optional_text("input")),
        Turn("assistant", reader.text("output")),
    ]


def _refuse_kto(reader: _Reader, dataset_format: str) -> None:
    """Refuse rows that say of their answer whether it is a good one.

    A number beside a prompt and its completion is taken for that too; elsewhere it may label anything.
    """
    marks = ["true", "false"]
    if "prompt" in FORMATS[dataset_format].required:
        marks += ["0", "1", "0.0", "1.0"]
    for column, says in (("label", marks), ("kto_tag", (*marks, "0", "1"))):
        value = reader.peek(column)
        if str(value).lower() in says:
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
        context = ["prompt"]  # TRL's form of what is said before the answers, and not learned
    turns = [replace(turn, train=False) for each in context for turn in reader.messages(each)]
    turns += reader.messages(column)
    mask = reader.peek("mask")
    masked = None if mask is None else masked_roles(mask, reader.where("mask"))
    if masked is None:
        return turns
    reader.value("mask")
    if "user" not in masked and any(turn.role == "user" for turn in turns):
        count(reader.account.message_keys, "a loss on the user's, which mask asks for")
    return [replace(turn, train=turn.train and turn.role not in masked) for turn in turns]


def _ended(text: str, special: SpecialText) -> str:
    """`text` without white space after the end token that it spells out at its end."""
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
    """An answer without the end token that its row spells at its end: it is written after every answer."""
    text = turn.text.rstrip()
    if turn.role != "assistant" or not text.endswith(end_token):
        return turn
    return replace(turn, text=text.removesuffix(end_token))


def _missing(each: Format, found: Collection[str], columns: Mapping[str, str]) -> list[str]:
    return [name for name in each.required if columns.get(name, name) not in found]


def _suggest(found: Collection[str], *formats: str) -> str:
    """The flags with which the data fits one of the formats; all that it needs, or none."""
    there = {name.strip("\ufeff \t").lower(): name for name in reversed(list(found))}
    for each in (FORMATS[name] for name in formats or FORMATS):
        given: dict[str, str] = {}
        for standard in each.required:
            names = [standard] if standard in there else _SYNONYMS.get(standard, ())
            fitting = [name for name in names if name in there and name not in COLUMNS - {standard}]
            if fitting:
                given[standard] = there[fitting[0]]
        if len(given) == len(each.required):
            given |= {name: there[name] for name in each.optional if name in there}
            flags = [f"--{name}_column {quoted(as_is)}" for name, as_is in given.items() if as_is != name]
            return f", for example {' '.join(flags)}"
    return ""
