"""What the columns of a row mean: recognised, named, renamed, and read into turns of a conversation."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.data.templates import Role, Segment, Template, Turn, get_template, guanaco_segments


@dataclass(frozen=True)
class Format:
    """A way in which a row holds text.

    Attributes:
        required: columns it needs.
        optional: columns it reads where they are there.
        template: what `--template auto` means for it.
        description: for messages.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    template: str
    description: str


# In the order in which they are tried: a row with both `messages` and `text` is a chat.
FORMATS: dict[str, Format] = {
    "chat": Format(("messages",), (), "falcon-instruct", "messages: a list of {role, content}"),
    "sharegpt": Format(("conversations",), (), "falcon-instruct", "conversations: a list of {from, value}"),
    "alpaca": Format(
        ("instruction", "output"), ("input",), "alpaca", "instruction and output, perhaps input"
    ),
    "prompt_completion": Format(("prompt", "completion"), (), "none", "prompt and completion"),
    "text": Format(("text",), (), "none", "text"),
}

COLUMNS = tuple(column for each in FORMATS.values() for column in (*each.required, *each.optional))

# Other names that data in the wild has for our columns, to be able to suggest the flag.
_SYNONYMS = {
    "output": ("response", "answer", "target", "label", "completion"),
    "completion": ("response", "answer", "output", "chosen"),
    "instruction": ("question", "query", "prompt"),
    "prompt": ("question", "query", "instruction", "context"),
    "text": ("content", "document", "body"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
}

# Numbers and dates, in a column of Parquet, are text as Python writes them.
_AS_TEXT = (str, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta)

_SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}


def recognise(
    found: Collection[str],
    *,
    columns: Mapping[str, str],
    dataset_format: str = "auto",
    source: str = "the data",
) -> tuple[str, dict[str, str]]:
    """Which format rows with these columns are in, and which of the renamed columns they have.

    Of several data sets one may have a column under the name that a flag gives, another under its own name.

    Args:
        found: the columns that the data has; none where there is no row.
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
                f"it has {_listed(found)}"
            )
    renamed = {standard: given for standard, given in columns.items() if given in found}
    missing = {name: _missing(each, found, renamed) for name, each in FORMATS.items()}
    if dataset_format == "auto":
        fitting = [name for name in FORMATS if not missing[name]]
        # A renamed column says which format is meant where the columns fit several.
        fitting.sort(key=lambda name: not set(FORMATS[name].required) & set(renamed))
        if fitting:
            return fitting[0], renamed
        needs = "\n".join(f"  {name}: {each.description}" for name, each in FORMATS.items())
        raise UserError(
            f"{source}: the columns fit no format.\nIt has {_listed(found)}. The formats need\n{needs}\n"
            "Name your columns with --text_column, --instruction_column, --output_column and so on"
            f"{_suggest(found)}."
        )
    if dataset_format not in FORMATS:
        raise UserError(
            f"--dataset_format {dataset_format}: no such format{nearest(dataset_format, FORMATS)}; "
            f"there are auto, {', '.join(FORMATS)}"
        )
    if lacking := missing[dataset_format]:
        raise UserError(
            f"{source}: format {dataset_format} needs {FORMATS[dataset_format].description}; "
            f"there is no column {_listed(lacking)}. It has {_listed(found)}. "
            f"Name the column with --{lacking[0]}_column, or another format with --dataset_format."
        )
    return dataset_format, renamed


def resolve_template(template: str, dataset_format: str) -> str:
    """The name of the template that `--template` means for rows of this format.

    Raises:
        UserError: if that template cannot write rows of this format.
    """
    if template == "auto":
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
    special_tokens = {
        name: token for name in ("bos_token", "eos_token") if (token := getattr(tokenizer, name)) is not None
    }
    return get_template(resolve_template(template, row_format), special_tokens)


def render(
    row: Mapping[str, Any],
    dataset_format: str,
    template: Template,
    *,
    columns: Mapping[str, str] | None = None,
    place: str = "a row",
) -> list[Segment]:
    """Write one row.

    Args:
        row: the columns' values.
        dataset_format: a key of `FORMATS`.
        template: as `resolve_template` chose it.
        columns: standard column name → its name in the row, for those that differ.
        place: names the row in messages, for example ``data.jsonl:17``.

    Returns:
        Segments which, laid end to end, are the row's text; none where the row has no answer to learn.

    Raises:
        UserError: if a value is not of the kind that the format needs.
    """
    names = columns or {}

    def value(column: str) -> Any:
        return row.get(names.get(column, column))

    def text(column: str) -> str:
        return _text(value(column), f"{place}: column {names.get(column, column)}")

    if dataset_format == "text":
        content = text("text")
        if not content.strip():
            return []
        if template.name == "guanaco":
            return guanaco_segments(content)
        return [Segment(content, train=True, end=True)]
    if dataset_format == "alpaca":
        turns = [Turn("user", text("instruction"), context=text("input")), Turn("assistant", text("output"))]
    elif dataset_format == "prompt_completion":
        turns = [Turn("user", text("prompt")), Turn("assistant", text("completion"))]
    else:
        column = FORMATS[dataset_format].required[0]
        turns = _turns(value(column), dataset_format, f"{place}: column {names.get(column, column)}")
    if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
        return []
    try:
        return template.segments(turns)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _turns(value: Any, dataset_format: str, place: str) -> list[Turn]:
    """Messages as turns. An empty answer is not learned, nor one of `weight` 0; both stay as context."""
    role_key, text_key = ("role", "content") if dataset_format == "chat" else ("from", "value")
    if value is None:
        return []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{place}: expected a list of messages, found {_kind(value)}")
    turns = []
    for number, message in enumerate(value, start=1):
        where = f"{place}: message {number}"
        if not isinstance(message, Mapping) or role_key not in message:
            raise UserError(f"{where}: expected {{{role_key}, {text_key}}}, found {_kind(message)}")
        name = message[role_key]
        role = _role(name, dataset_format)
        if role is None:
            known = get_args(Role) if dataset_format == "chat" else tuple(_SPEAKERS)
            raise UserError(
                f"{where}: unknown {role_key} {name!r}{nearest(str(name), known)}; "
                f"known are {', '.join(known)}"
            )
        content = _text(message.get(text_key), where)
        trained = bool(content.strip()) and message.get("weight") != 0
        turns.append(Turn(role, content, train=trained))
    return turns


def _role(name: Any, dataset_format: str) -> Role | None:
    if dataset_format == "sharegpt":
        return _SPEAKERS.get(str(name).lower())
    # OpenAI's newer name for system.
    return {"developer": "system", **{role: role for role in get_args(Role)}}.get(str(name))


def _text(value: Any, place: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in value
    ):
        value = "".join(_text(part.get("text"), place) for part in value)
    if isinstance(value, bool) or not isinstance(value, _AS_TEXT):
        raise UserError(f"{place}: expected text, found {_kind(value)}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON may spell half of a surrogate pair, which is no character.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _missing(each: Format, found: Collection[str], columns: Mapping[str, str]) -> list[str]:
    return [name for name in each.required if columns.get(name, name) not in found]


def _suggest(found: Collection[str]) -> str:
    for standard, synonyms in _SYNONYMS.items():
        for synonym in synonyms:
            if synonym in found and synonym not in COLUMNS:
                return f", for example --{standard}_column {synonym}"
    return ""


def _listed(names: Collection[str]) -> str:
    if not names:
        return "no columns"
    shown = sorted(names)
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"an object with {_listed([str(key) for key in value])}"
    kinds = {list: "a list", bool: "true or false", str: "text", int: "a number", float: "a number"}
    return kinds.get(type(value), f"{type(value).__name__}")
