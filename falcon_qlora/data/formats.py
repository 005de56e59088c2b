"""Recognise the format of rows by their columns, and choose the template for it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.files import quoted
from falcon_qlora.data.json_rows import listed, spelled
from falcon_qlora.data.templates import TOKENIZER, Template, get_template

SYSTEM = ("system", "system_prompt")
_OF_CHATS = (*SYSTEM, "tools", "mask")
_OF_ALPACA = (*SYSTEM, "tools", "history")


@dataclass(frozen=True)
class Format:
    """A way in which a row holds text.

    Attributes:
        required: columns it needs; a flag may give another name.
        optional: columns it reads if present; a flag may give another name.
        also: columns it reads if present, under these names only.
        template: its template, unless `--template` or the tokenizer decides (see `resolve_template`).
        description: for messages.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    template: str
    description: str
    also: tuple[str, ...] = ()


# Tried in this order: a row with both `messages` and `text` is a chat.
FORMATS: dict[str, Format] = {
    "chat": Format(
        ("messages",),
        (),
        "falcon-instruct",
        "messages: a list of {role, content} or {from, value}",
        _OF_CHATS,
    ),
    "sharegpt": Format(
        ("conversations",),
        (),
        "falcon-instruct",
        "conversations: a list of {from, value} or {role, content}",
        _OF_CHATS,
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

# Names that public data often uses for these columns, for suggesting flags.
_SYNONYMS = {
    "output": ("response", "answer", "target", "label", "completion"),
    "completion": ("response", "answer", "output"),
    "instruction": ("question", "query", "prompt"),
    "prompt": ("question", "query", "instruction", "context"),
    "text": ("content", "document", "body"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
}

# Words in other columns' names, for guessing flags.
_ASKS = frozenset("question query prompt instruction input ask user human request title problem q".split())
_SAYS = frozenset("answer reply response output completion assistant bot solution summary target a".split())
_NO_TEXT = frozenset(
    "id ids uuid index idx url link date time timestamp score rating lang language rejected".split()
)

_PLAIN_ANSWERS = ("completion", "output", "response")
_OF_MESSAGES = ({"role", "content"}, {"from", "value"})
_CHATS = ("chat", "sharegpt", "chat_completion")

# Values of `--template` besides templates. AUTO is the tokenizer's own for chats if it has one, else the
# format's. BY_FORMAT is always the format's, which is what `auto` meant in earlier runs.
AUTO, BY_FORMAT = "auto", "format"


def recognise(
    found: Collection[str],
    *,
    arrays: Collection[str] = (),
    columns: Mapping[str, str],
    dataset_format: str = "auto",
    source: str = "the data",
    others: bool = False,
) -> tuple[str, dict[str, str]]:
    """Which format rows with these columns are in, and which of the renamed columns they have.

    One data set may have a column under the name that a flag gives, another under the standard name, and a
    third, in another format, neither.

    Args:
        found: the columns that the data has; empty if it has no rows.
        arrays: those whose values are arrays or objects.
        columns: standard column name → its name in the data, as the flags give them.
        dataset_format: the user's choice, or ``"auto"``.
        source: names the data in messages.
        others: whether there are other data sets, whose columns a flag may name.

    Returns:
        A key of `FORMATS`, and those of `columns` that the data has.

    Raises:
        UserError: if the data is empty, lacks a renamed column that it needs, or does not fit the chosen
            format or any format.
    """
    if not found:
        raise UserError(f"{source}: the data is empty, there is no row with a column in it")
    renamed = {standard: given for standard, given in columns.items() if given in found}
    missing = {name: _missing(each, found, renamed) for name, each in FORMATS.items()}
    fits = not all(missing.values()) if dataset_format == "auto" else not missing.get(dataset_format)
    for standard, given in columns.items():
        if given not in found and standard not in found and not (others and fits):
            raise UserError(
                f"--{standard}_column {given}: {source} has no such column{nearest(given, found)}; "
                f"it has {listed(found)}"
            )
    one_message = not renamed and any(pair <= set(found) for pair in _OF_MESSAGES)
    if dataset_format == "auto" and one_message and all(missing.values()):
        raise UserError(
            f"{source}: every row is a message (it has {listed(found)}), not a conversation. Put the "
            'messages of each conversation into one row: {"messages": [{"role": …, "content": …}, …]}'
        )
    if dataset_format == "auto" and not renamed:
        _refuse_preferences(found, fits, source)
    if dataset_format == "auto":
        fitting = [name for name in FORMATS if not missing[name]]
        # If several formats fit, a renamed column says which one is meant.
        fitting.sort(key=lambda name: not set(FORMATS[name].required) & set(renamed))
        if not fitting:
            raise UserError(
                f"{source}: the columns fit no format.",
                f"It has {listed(found)}. The formats need",
                *(f"  {name}: {each.description}" for name, each in FORMATS.items()),
                _without_header(found, source)
                or "Name your columns with --text_column, --instruction_column, --output_column and so on"
                f"{_suggest(found) or _guess(found, arrays)}.",
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
    renamed = _used(renamed, dataset_format, source, others=others)
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


def read_as(row_format: str, columns: Mapping[str, str], template: str) -> str:
    """The format, its renamed columns, and the template, for a message."""
    renamed = ", ".join(f"{given} as {standard}" for standard, given in columns.items() if given != standard)
    return f"format {row_format}{renamed and f' ({renamed})'}, template {template}"


def load_template(template: str, row_format: str, tokenizer: Any) -> Template:
    """The template that `--template` means for rows of this format, with the tokenizer's special tokens."""
    name = resolve_template(template, row_format, tokenizer)
    return get_template(name, tokenizer.special_tokens_map, tokenizer.chat_template)


def _used(renamed: dict[str, str], dataset_format: str, source: str, *, others: bool) -> dict[str, str]:
    """Those of the renamed columns that the format reads."""
    known = FORMATS[dataset_format]
    # Messages of a prompt may stand before a chat.
    reads = {*known.required, *known.optional, *(("prompt",) if dataset_format in _CHATS else ())}
    for standard in () if others else renamed.keys() - reads:
        raise UserError(
            f"--{standard}_column {renamed[standard]}: {source} is read as format {dataset_format}, which "
            f"has no {standard}; drop the flag, or name the other columns that go with it"
        )
    used = {standard: given for standard, given in renamed.items() if standard in reads}
    if len({used.get(column, column) for column in known.required}) < len(known.required):
        raise UserError(
            f"{source}: {' and '.join(known.required)} are one column, {listed(set(used.values()))}; name "
            f"another with {' or '.join(f'--{column}_column' for column in known.required)}"
        )
    return used


def _refuse_preferences(found: Collection[str], fits: bool, source: str) -> None:
    """Refuse columns of better and worse answers, or of an answer with a label if they fit no format."""
    untrained = "Preferences are not trained here, answers are"
    if (better := _better_of_pairs(found)) is not None:
        raise UserError(
            f"{source}: pairs of a chosen and a rejected answer (it has {listed(found)}). {untrained}. "
            f"To train on the chosen ones, name their column: --completion_column {quoted(better)} beside a "
            f"column prompt, --output_column {quoted(better)} beside instruction, --messages_column "
            f"{quoted(better)} where they are lists of messages, --text_column {quoted(better)} where they "
            "are whole texts"
        )
    if not fits and {"completion", "label"} <= set(found):
        raise UserError(
            f"{source}: answers with a label (it has {listed(found)}), as KTO's good and bad ones. "
            f"{untrained}: put the rows of good answers into a file without the label, and name their "
            "column: --messages_column completion where they are lists of messages"
        )


def _better_of_pairs(found: Collection[str]) -> str | None:
    """The column of the better of two answers, if there is one of the worse; None if there is not."""
    words = {name: set(re.findall("[a-z]+", name.lower())) for name in found}

    def named(marks: set[str]) -> list[str]:
        """Columns called that, perhaps with a word for an answer, as chosen_response."""
        return sorted(name for name in found if words[name] & marks and words[name] <= marks | _SAYS)

    better = named({"chosen", "accepted", "preferred"}) or [name for name in _PLAIN_ANSWERS if name in found]
    return better[0] if better and named({"rejected", "dispreferred"}) else None


def _missing(each: Format, found: Collection[str], columns: Mapping[str, str]) -> list[str]:
    return [name for name in each.required if columns.get(name, name) not in found]


def _without_header(found: Collection[str], source: str) -> str | None:
    """What to do about a table whose first line is a row; None if it may be a header."""
    if not re.search(r"\.[ct]sv\b", source) or not any(re.search(r"[.?!]\s*$", name) for name in found):
        return None
    return "If its first line is a row, write a header above it, such as: instruction,output"


def _suggest(found: Collection[str], *formats: str) -> str:
    """Flags with which the data would fit one of the formats: all that the format needs, or none."""
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


def _guess(found: Collection[str], arrays: Collection[str]) -> str:
    """Flags of the data's own columns: question and answer by words in their names, or by their order."""
    words = {name: set(re.findall("[a-z]+", name.lower())) for name in found if name not in arrays}
    texts = [name for name in words if not words[name] & _NO_TEXT]
    if len(texts) < 2:
        return "".join(
            f", for example --text_column {quoted(name)}" for name in texts if not words[name] & _ASKS
        )
    answer = next((name for name in texts if words[name] & _SAYS), None)
    asked = next((name for name in texts if words[name] & _ASKS and name != answer), None)
    asked = asked or next(name for name in texts if name != answer)
    answer = answer or next(name for name in texts if name != asked)
    return (
        f". If {spelled(asked)} asks and {spelled(answer)} answers: --instruction_column {quoted(asked)} "
        f"--output_column {quoted(answer)}"
    )
