"""Write a conversation as text, and mark which of that text is an answer.

A template returns segments, each with its text and whether it counts for the loss. The mask thus comes from
the same code as the text and cannot drift away from it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.files import sha256
from falcon_qlora.common.untrusted import read_text

Role = Literal["system", "user", "assistant", "tool"]

# Keys of a message that hold the model's reasoning before its answer.
REASONING = ("reasoning_content", "reasoning", "thinking")

_TEMPLATE_LIMIT_BYTES = 2**20

TOKENIZER = "tokenizer"  # the tokenizer's own chat template
TEMPLATES = ("alpaca", "guanaco", "falcon-instruct", "none", TOKENIZER)

_ALPACA_OPENING = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request."
)
_ALPACA_WITH_INPUT = _ALPACA_OPENING.format(", paired with an input that provides further context")
_ALPACA_WITHOUT_INPUT = _ALPACA_OPENING.format("")

_GUANACO_HUMAN = "### Human:"
_GUANACO_ASSISTANT = "### Assistant:"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: who speaks.
        text: what is said.
        context: Alpaca's `input`: what the instruction is about.
        train: for an assistant's turn, whether the loss counts it.
        fields: what else the message holds, for a chat template in Jinja: tool calls, reasoning, names.
            A `content` of None there means a message without text.
    """

    role: Role
    text: str
    context: str = ""
    train: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> str:
        """The text, followed by the context."""
        return f"{self.text}\n{self.context}" if self.context else self.text

    def held(self, *names: str) -> list[str]:
        """Which of these fields are not empty."""
        return [name for name in names if self.fields.get(name) not in (None, "", [], {})]


@dataclass(frozen=True)
class Segment:
    """A stretch of a row's text.

    Attributes:
        text: the stretch; the segments of a row laid end to end are the row.
        train: whether the loss counts it.
        end: whether an answer ends with it, so that the end token follows.
        why: of a row's first segment: why the row is dropped, if nothing of it is trained.
    """

    text: str
    train: bool
    end: bool = False
    why: str = field(default="", compare=False)


# The segments of a row that lacks something that training needs. A row with an empty answer has no segments.
LACKING = [Segment("", train=False)]


class Template(Protocol):
    """Writes conversations as text."""

    @property
    def name(self) -> str:
        """As the user gave it."""

    @property
    def identity(self) -> str:
        """A key that changes whenever the template's text may change."""

    def segments(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None) -> list[Segment]:
        """The whole conversation, with the answers marked.

        Raises:
            UserError: for a conversation that it cannot write whole.
        """

    def suited(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None) -> Sequence[Turn]:
        """The turns as it takes them: the arguments of tool calls as JSON text, or as objects."""

    def unread(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None) -> list[str]:
        """Names of message fields that it does not write, once for each turn that has them."""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text up to where the assistant's next answer begins."""


@dataclass(frozen=True)
class _Written:
    """A template that writes turn by turn, so that no text depends on later turns."""

    name: str
    write: Callable[[Sequence[Turn]], list[Segment]]
    answer_header: str

    @property
    def identity(self) -> str:
        return f"{self.name}/1"

    def segments(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None) -> list[Segment]:
        if tools:
            raise cannot_write(self.name, "the tools of a row")
        for number, turn in enumerate(turns, start=1):
            if held := turn.held("tool_calls", *REASONING):
                raise cannot_write(self.name, f"{held[0]} (of message {number})")
            if turn.role == "tool":
                raise cannot_write(self.name, f"what a tool says (message {number})")
        return [segment for segment in self.write(turns) if segment.text or segment.end]

    def suited(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None) -> Sequence[Turn]:
        return turns

    def unread(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None) -> list[str]:
        return [name for turn in turns for name in turn.held(*turn.fields)]

    def prompt(self, turns: Sequence[Turn]) -> str:
        return "".join(segment.text for segment in self.write(turns)) + self.answer_header


def cannot_write(name: str, what: str) -> UserError:
    """The error for a row that a template cannot write whole."""
    return UserError(
        f"template {name} cannot write {what}. Use --template tokenizer with a tokenizer whose chat template "
        "can, or a .jinja file that can; or take it out of the rows"
    )


def _write_alpaca(turns: Sequence[Turn]) -> list[Segment]:
    """The Alpaca template; a system message replaces its opening, and later turns have none."""
    segments: list[Segment] = []
    opening: str | None = None
    first = True
    for turn in turns:
        if turn.role == "system":
            if segments:
                raise cannot_write("alpaca", "a system message after the first other one")
            opening = turn.text if opening is None else f"{opening}\n\n{turn.text}"
        elif turn.role == "user":
            if first:
                default = _ALPACA_WITH_INPUT if turn.context else _ALPACA_WITHOUT_INPUT
                before = f"{default if opening is None else opening}\n\n"
            else:
                before = "\n\n"
            body = f"### Instruction:\n{turn.text}"
            if turn.context:
                body += f"\n\n### Input:\n{turn.context}"
            segments.append(Segment(before + body, train=False))
            first = False
        else:
            segments.append(Segment("\n\n### Response:", train=False))
            segments.append(Segment(turn.text, train=turn.train, end=True))
    return segments


def _write_guanaco(turns: Sequence[Turn]) -> list[Segment]:
    """The form of the rows of openassistant-guanaco: one space after a marker, nothing before it."""
    segments: list[Segment] = []
    begun = False
    for turn in turns:
        begun |= turn.role != "system"
        if turn.role == "system":
            if begun:
                raise cannot_write("guanaco", "a system message after the first message")
            segments.append(Segment(f"{turn.text}\n", train=False))
        elif turn.role == "user":
            segments.append(Segment(f"{_GUANACO_HUMAN} {turn.said}", train=False))
        else:
            segments.append(Segment(_GUANACO_ASSISTANT, train=False))
            segments.append(Segment(f" {turn.text}", train=turn.train, end=True))
    return segments


def _write_falcon_instruct(turns: Sequence[Turn]) -> list[Segment]:
    """As the chat template in the tokenizer_config.json of tiiuae/falcon-7b-instruct writes.

    A system message comes first, stripped; every other one is ``'\\n\\n' + message['role'].title() + ': ' +
    message['content'].strip().replace('\\r\\n', '\\n').replace('\\n\\n', '\\n')``. This drops white space
    at the ends of messages, and halves the line breaks of empty lines, since an empty line separates turns.
    `render` counts the rows that this changes.
    """

    def published(text: str) -> str:
        return text.strip().replace("\r\n", "\n").replace("\n\n", "\n")

    segments: list[Segment] = []
    for turn in turns:
        if turn.role == "system":
            later = f"\n\nSystem: {published(turn.text)}"
            segments.append(Segment(later if segments else turn.text.strip(), train=False))
        elif turn.role == "user":
            segments.append(Segment(f"\n\nUser: {published(turn.said)}", train=False))
        else:
            segments.append(Segment("\n\nAssistant:", train=False))
            segments.append(Segment(f" {published(turn.text)}", train=turn.train, end=True))
    return segments


def _write_plain(turns: Sequence[Turn]) -> list[Segment]:
    """Prompt and completion as they are."""
    return [
        Segment(turn.text, train=turn.train, end=True)
        if turn.role == "assistant"
        else Segment(turn.said, train=False)
        for turn in turns
    ]


_WRITTEN = {
    "alpaca": _Written("alpaca", _write_alpaca, "\n\n### Response:"),
    "guanaco": _Written("guanaco", _write_guanaco, _GUANACO_ASSISTANT),
    "falcon-instruct": _Written("falcon-instruct", _write_falcon_instruct, "\n\nAssistant:"),
    "none": _Written("none", _write_plain, ""),
}


def guanaco_segments(text: str) -> list[Segment]:
    """Find the answers in text that already has guanaco's markers.

    The text stays as it is; an answer is what stands between ``### Assistant:`` and the next marker.
    """
    segments: list[Segment] = []
    answer = False
    for part in re.split(f"({_GUANACO_HUMAN}|{_GUANACO_ASSISTANT})", text):
        if part in (_GUANACO_HUMAN, _GUANACO_ASSISTANT):
            answer = part == _GUANACO_ASSISTANT
            segments.append(Segment(part, train=False))
        elif part:
            segments.append(Segment(part, train=answer and bool(part.strip()), end=answer))
    return segments


def get_template(
    name: str, special_tokens: Mapping[str, str] | None = None, chat_template: Any = None
) -> Template:
    """The template of this name, or in this ``.jinja`` file.

    Args:
        name: one of `TEMPLATES` or a path.
        special_tokens: what a Jinja template may refer to, for example ``{"eos_token": "<|endoftext|>"}``.
        chat_template: the tokenizer's own: a text, or texts by the names ``default`` and ``tool_use``.

    Raises:
        UserError: if there is no such template, or it cannot be read.
    """
    from falcon_qlora.data.jinja_template import JinjaTemplate

    if name in _WRITTEN:
        return _WRITTEN[name]
    if name == TOKENIZER:
        by_name = chat_template if isinstance(chat_template, dict) else {"default": chat_template}
        if not isinstance(by_name.get("default"), str):
            raise UserError(
                "--template tokenizer: the tokenizer has no chat template of its own; name one of "
                f"{', '.join(_WRITTEN)}, or a .jinja file"
            )
        return JinjaTemplate(name, by_name["default"], dict(special_tokens or {}), by_name.get("tool_use"))
    path = Path(name).expanduser()
    if path.suffix in (".jinja", ".jinja2", ".j2") or "/" in name:
        try:
            text = read_text(path, limit_bytes=_TEMPLATE_LIMIT_BYTES)
        except UserError as error:
            raise UserError(f"--template {name}: cannot be read: {error}") from None
        return JinjaTemplate(name, text, dict(special_tokens or {}))
    raise UserError(
        f"--template {name}: no such template{nearest(name, ('auto', *TEMPLATES))}; "
        f"there are auto, {', '.join(TEMPLATES)}, or a path to a .jinja file"
    )


def template_fingerprint(name: str, chat_template: Any = None) -> str | None:
    """The SHA-256 of a template's text; None for templates that come with the package.

    Args:
        name: as in `get_template`.
        chat_template: the tokenizer's own, as in `get_template`.
    """
    if name == TOKENIZER and chat_template:
        texts = [chat_template] if isinstance(chat_template, str) else chat_template.values()
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()
    path = Path(name).expanduser()
    return sha256(path) if name not in TEMPLATES and path.is_file() else None
