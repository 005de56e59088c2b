"""How a conversation becomes text, and which of that text is an answer.

A template only says what is written where. Which parts count for the loss is carried along as segments,
so that the mask follows from the same code that writes the text and cannot drift away from it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from falcon_qlora.common.errors import UserError, nearest, one_line
from falcon_qlora.common.files import sha256
from falcon_qlora.common.untrusted import read_text

Role = Literal["system", "user", "assistant"]

_TEMPLATE_LIMIT_BYTES = 2**20
# What comes of an expression that does not suit what it is about; and of one that asks for too much.
_OF_EXPRESSIONS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(RecursionError, MemoryError),
)

TEMPLATES = ("alpaca", "guanaco", "falcon-instruct", "none")

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
        train: of an assistant's turn, whether the loss is to count it.
    """

    role: Role
    text: str
    context: str = ""
    train: bool = True


@dataclass(frozen=True)
class Segment:
    """A stretch of a row's text.

    Attributes:
        text: the stretch; the segments of a row laid end to end are the row.
        train: whether it is an answer, that is, whether the loss counts it.
        end: whether an answer ends with it, so that the end token follows.
    """

    text: str
    train: bool
    end: bool = False


class Template(Protocol):
    """What writes a conversation."""

    @property
    def name(self) -> str:
        """As the user gave it."""

    @property
    def identity(self) -> str:
        """Changes whenever the text it writes may change."""

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """The whole conversation, with the answers marked."""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text up to where the assistant's next answer begins."""


@dataclass(frozen=True)
class _Written:
    """A template that writes turn by turn: what precedes an answer does not depend on what follows it."""

    name: str
    write: Callable[[Sequence[Turn]], list[Segment]]
    answer_header: str

    @property
    def identity(self) -> str:
        return f"{self.name}/1"

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        return [segment for segment in self.write(turns) if segment.text or segment.end]

    def prompt(self, turns: Sequence[Turn]) -> str:
        return "".join(segment.text for segment in self.write(turns)) + self.answer_header


def _said(turn: Turn) -> str:
    return f"{turn.text}\n{turn.context}" if turn.context else turn.text


def _write_alpaca(turns: Sequence[Turn]) -> list[Segment]:
    """The Alpaca template; a system message takes the place of its opening, later turns go without one."""
    segments: list[Segment] = []
    opening: str | None = None
    first = True
    for turn in turns:
        if turn.role == "system":
            opening = turn.text
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
    """As the rows of openassistant-guanaco are written: one space after a marker, nothing before it."""
    segments: list[Segment] = []
    for turn in turns:
        if turn.role == "system":
            segments.append(Segment(f"{turn.text}\n", train=False))
        elif turn.role == "user":
            segments.append(Segment(f"{_GUANACO_HUMAN} {_said(turn)}", train=False))
        else:
            segments.append(Segment(_GUANACO_ASSISTANT, train=False))
            segments.append(Segment(f" {turn.text}", train=turn.train, end=True))
    return segments


def _write_falcon_instruct(turns: Sequence[Turn]) -> list[Segment]:
    """As the chat template published with Falcon-7B-instruct writes.

    It strips every message and halves the line breaks of empty lines, since an empty line separates turns.
    """

    def published(text: str) -> str:
        return text.strip().replace("\r\n", "\n").replace("\n\n", "\n")

    segments: list[Segment] = []
    for turn in turns:
        if turn.role == "system":
            segments.append(Segment(turn.text.strip(), train=False))
        elif turn.role == "user":
            segments.append(Segment(f"\n\nUser: {published(_said(turn))}", train=False))
        else:
            segments.append(Segment("\n\nAssistant:", train=False))
            segments.append(Segment(f" {published(turn.text)}", train=turn.train, end=True))
    return segments


def _write_plain(turns: Sequence[Turn]) -> list[Segment]:
    """Prompt and completion as they are."""
    return [
        Segment(turn.text, train=turn.train, end=True)
        if turn.role == "assistant"
        else Segment(_said(turn), train=False)
        for turn in turns
    ]


_WRITTEN = {
    "alpaca": _Written("alpaca", _write_alpaca, "\n\n### Response:"),
    "guanaco": _Written("guanaco", _write_guanaco, _GUANACO_ASSISTANT),
    "falcon-instruct": _Written("falcon-instruct", _write_falcon_instruct, "\n\nAssistant:"),
    "none": _Written("none", _write_plain, ""),
}


def guanaco_segments(text: str) -> list[Segment]:
    """Find the answers in text that is already written with guanaco's markers.

    The text stays as it is; what stands between ``### Assistant:`` and the next ``### Human:`` is an answer.
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


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template in Jinja, as tokenizers publish them, over `messages` with OpenAI's roles.

    Answers are what ``{% generation %}`` marks. Without that, an answer is what the template adds when the
    assistant's message joins the messages before it (rendered with `add_generation_prompt`).

    Args:
        name: as the user gave it, for messages.
        text: the template.
        special_tokens: names such as ``eos_token`` and what they stand for.

    Raises:
        UserError: if the template is not valid Jinja, refuses a conversation, or writes a conversation's
            beginning differently once more messages follow.
    """

    name: str
    text: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import jinja2

        try:
            self._render([], check_only=True)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{self.name}:{error.lineno}: not a valid Jinja template: {error.message}"
            ) from None

    @property
    def identity(self) -> str:
        return (
            f"jinja/1/{hashlib.sha256(self.text.encode()).hexdigest()}/{sorted(self.special_tokens.items())}"
        )

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        messages = [{"role": turn.role, "content": _said(turn)} for turn in turns]
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        text, marked = self._render(messages)
        if marked is None:
            marked = [self._span(messages, index, text) for index in answers]
        elif len(marked) != len(answers):
            raise UserError(
                f"{self.name}: {{% generation %}} marks {len(marked)} answers in a conversation "
                f"of {len(answers)}; put it around the assistant's content and nothing else"
            )
        segments: list[Segment] = []
        position = 0
        for (start, end), index in zip(marked, answers, strict=True):
            segments.append(Segment(text[position:start], train=False))
            segments.append(Segment(text[start:end], train=turns[index].train, end=True))
            position = end
        segments.append(Segment(text[position:], train=False))
        return [segment for segment in segments if segment.text or segment.end]

    def prompt(self, turns: Sequence[Turn]) -> str:
        messages = [{"role": turn.role, "content": _said(turn)} for turn in turns]
        return self._render(messages, add_generation_prompt=True)[0]

    def _span(self, messages: list[dict[str, str]], index: int, text: str) -> tuple[int, int]:
        before = self._render(messages[:index], add_generation_prompt=True)[0]
        after = self._render(messages[: index + 1])[0]
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{self.name}: the answers cannot be told from the prompts, because the template writes the "
                "beginning of a conversation differently once more messages follow; put {% generation %} and "
                "{% endgeneration %} around the assistant's content in the template"
            )
        return len(before), len(after)

    def _render(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False, check_only: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        marks = re.search(r"{%-?\s*generation\s*-?%}", self.text) is not None
        conversations: list[list[dict[str, str]]] = [] if check_only else [messages]
        try:
            # Sandboxed: a template comes from a file that anyone may have written.
            rendered: Any = render_jinja_template(
                conversations=conversations,
                chat_template=self.text,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **dict(self.special_tokens),
            )
        except jinja2.TemplateSyntaxError:
            raise
        except (jinja2.TemplateError, *_OF_EXPRESSIONS) as error:
            told = one_line(error)
            raise UserError(f"{self.name}: the template refuses a conversation: {told}") from None
        if check_only:
            return "", None
        texts, spans = rendered
        return texts[0], [tuple(span) for span in spans[0]] if marks else None


def get_template(name: str, special_tokens: Mapping[str, str] | None = None) -> Template:
    """The template of this name, or of this ``.jinja`` file.

    Args:
        name: one of `TEMPLATES` or a path.
        special_tokens: what a Jinja template may refer to, for example ``{"eos_token": "<|endoftext|>"}``.

    Raises:
        UserError: if there is no such template.
    """
    if name in _WRITTEN:
        return _WRITTEN[name]
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


def template_fingerprint(name: str) -> str | None:
    """A hash of the file that a template's name means; None for the names of `TEMPLATES`, or no file."""
    path = Path(name).expanduser()
    return sha256(path) if name not in _WRITTEN and path.is_file() else None
