"""Chat templates in Jinja, as tokenizers publish them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from falcon_qlora.common.errors import UserError, one_line
from falcon_qlora.data.conversation import parsed, with_arguments
from falcon_qlora.data.special_text import is_marked, unmarked
from falcon_qlora.data.templates import REASONING, Segment, Turn, cannot_write

# What a template's expressions raise: on values that do not suit them, and when they ask for too much.
_OF_EXPRESSIONS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(RecursionError, MemoryError),
)
_MARKS = (
    "{% generation %} and {% endgeneration %} around the assistant's content in a copy of the template, and "
    "name that: --template FILE.jinja"
)
_OF_CALL, _OF_TOOL = " of a call", " of a tool"
_MUST_BE_WRITTEN = ("tool_calls", *REASONING)
# Appended to a message's text to see whether a template writes the text. Nothing escapes or strips it.
_PROBE = "Qz7{}zQ"

Messages = list[dict[str, Any]]
Tools = Sequence[Any] | None


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template over `messages` with OpenAI's roles, and `tools`.

    Answers are what ``{% generation %}`` marks, with the end token if that follows. Without marks, an answer
    is what the template adds when the assistant's message joins the messages before it (rendered with
    `add_generation_prompt`), up to the end token if that is written. Some templates write earlier answers
    differently from the last. Then only the last answer can be trained.

    Args:
        name: as the user gave it, for messages.
        text: the template.
        special_tokens: names such as ``eos_token`` → their text.
        tool_use: another template, for rows with `tools`.

    Raises:
        UserError: if the template is not valid Jinja.
    """

    name: str
    text: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    tool_use: str | None = None
    _unread: dict[Any, frozenset[str]] = field(default_factory=dict, compare=False, repr=False)
    _wants_objects: dict[Any, bool] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        import jinja2

        of_rows: tuple[Tools, ...] = (None, [])
        for tools in of_rows:
            try:
                self._render([], tools, check_only=True)
            except jinja2.TemplateSyntaxError as error:
                raise UserError(
                    f"{self.name}:{error.lineno}: not a valid Jinja template: {error.message}"
                ) from None

    @property
    def identity(self) -> str:
        texts = self.text if self.tool_use is None else f"{self.text}\0{self.tool_use}"
        return f"jinja/2/{hashlib.sha256(texts.encode()).hexdigest()}/{sorted(self.special_tokens.items())}"

    def segments(self, turns: Sequence[Turn], tools: Tools = None) -> list[Segment]:
        messages = [_message(turn) for turn in turns]
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        messages, text, marked = self._render_whole(messages, tools)
        if marked is not None and len(marked) > len(answers):
            marked = _joined(marked)
        if marked is None:
            spans = {index: self._span(messages, tools, index, text) for index in answers}
            for number, index in enumerate(answers, start=1):
                if spans[index] is None and turns[index].train:
                    raise self._not_told(number, is_last=index == len(messages) - 1)
            answers = [index for index in answers if spans[index] is not None]
            marked = [span for span in spans.values() if span is not None]
        elif len(marked) != len(answers):
            raise UserError(
                f"{self.name}: {{% generation %}} marks {len(marked)} answers in a conversation "
                f"of {len(answers)}; put it around the assistant's content and nothing else"
            )
        else:
            for (start, end), index in zip(marked, answers, strict=True):
                said = turns[index].text.strip()
                if said not in text[start:end] and said in text:
                    raise UserError(
                        f"{self.name}: {{% generation %}} leaves out the text of message {index + 1} "
                        "(assistant); put it around the assistant's content and nothing else"
                    )
        segments: list[Segment] = []
        position = 0
        for (start, end), index in zip(marked, answers, strict=True):
            segments.append(Segment(text[position:start], train=False))
            answer = self._answer(text[start:end], text[end:], train=turns[index].train)
            segments += answer
            position = start + sum(len(segment.text) for segment in answer)
        segments.append(Segment(text[position:], train=False))
        return [segment for segment in segments if segment.text or segment.end]

    def suited(self, turns: Sequence[Turn], tools: Tools = None) -> Sequence[Turn]:
        """As `Template.suited`.

        OpenAI has the arguments of a call as JSON text, Transformers' templates as an object. Text stays as
        it is if the template writes the same for either. If it quotes the text once more or refuses it, it
        gets the object.
        """
        objects = [with_arguments(turn, parsed) for turn in turns]
        if objects == list(turns):
            return turns
        shape = _shape(turns, tools)
        if shape not in self._wants_objects:
            texts = [with_arguments(turn, _dumped) for turn in objects]
            self._wants_objects[shape] = self._takes(objects, tools) not in (None, self._takes(texts, tools))
        return objects if self._wants_objects[shape] else turns

    def _takes(self, turns: Sequence[Turn], tools: Tools) -> str | None:
        """What it writes; None if it refuses."""
        try:
            return self._render_whole([_message(turn) for turn in turns], tools)[1]
        except UserError:
            return None

    def unread(self, turns: Sequence[Turn], tools: Tools = None) -> list[str]:
        """As `Template.unread`.

        Raises:
            UserError: if the template leaves out a message, its tool calls, its reasoning, or the tools.
        """
        shape = _shape(turns, tools)
        if shape not in self._unread:
            self._unread[shape] = self._leaves_out([_message(turn) for turn in turns], tools)
        unread = self._unread[shape]
        of_turns = [
            {*turn.held(*turn.fields), *_keys(turn.fields.get("tool_calls"), _OF_CALL)} for turn in turns
        ]
        return [name for held in (*of_turns, _keys(tools, _OF_TOOL)) for name in sorted(held & unread)]

    def prompt(self, turns: Sequence[Turn]) -> str:
        return self._render([_message(turn) for turn in turns], None, add_generation_prompt=True)[0]

    def _answer(self, answer: str, after: str, *, train: bool) -> list[Segment]:
        """An answer's segments; the last ends with the end token if the template writes one."""
        end_token = self.special_tokens.get("eos_token")
        if not end_token:
            return [Segment(answer, train=train, end=True)]
        stripped = answer.rstrip()
        if stripped.endswith(end_token):
            return [Segment(stripped, train=train, end=True)]
        space = after[: len(after) - len(after.lstrip())]
        if not after.startswith(space + end_token):
            return [Segment(answer, train=train, end=True)]
        if not space:
            return [Segment(answer + end_token, train=train, end=True)]
        return [
            Segment(answer, train=train),
            Segment(space, train=False),
            Segment(end_token, train=train, end=True),
        ]

    def _render_whole(
        self, messages: Messages, tools: Tools
    ) -> tuple[Messages, str, list[tuple[int, int]] | None]:
        """The messages in a form that renders well, and what `_render` makes of them.

        Raises:
            UserError: if the template changes text that is marked to stay text.
        """
        text, marked = self._render(messages, tools)
        if any(message["content"] is None for message in messages) and "None" in text:
            # A template that would write null as the word None gets empty text instead.
            filled = [message | {"content": message["content"] or ""} for message in messages]
            other, marked_other = self._render(filled, tools)
            if other.count("None") < text.count("None"):
                messages, text, marked = filled, other, marked_other
        if is_marked(text) or any(map(_has_marks, (messages, tools))):
            plain = self._render(_without_marks(messages), _without_marks(tools))[0]
            if unmarked(text) != plain:
                raise UserError(
                    f"template {self.name} changes text that looks like special tokens in this row (such as "
                    "<|endoftext|> in a message), so it cannot be kept as text; take it out of the row"
                )
        return messages, text, marked

    def _leaves_out(self, messages: Messages, tools: Tools) -> frozenset[str]:
        """The fields of messages that the template does not write."""
        text = self._render(messages, tools)[0]
        probed = [
            message | ({"content": message["content"] + _PROBE.format(index)} if message["content"] else {})
            for index, message in enumerate(messages)
        ]
        shown = self._render(probed, tools)[0]
        for index, message in enumerate(messages):
            if not message["content"] or shown.count(_PROBE.format(index)) > text.count(_PROBE.format(index)):
                continue
            # A template that rewrites the text has not left it out; `render` counts such rows.
            if self._render([*messages[:index], probed[index], *messages[index + 1 :]], tools)[0] == text:
                raise cannot_write(self.name, f"message {index + 1} ({message['role']}), which it leaves out")
        if tools and self._writes(text, messages, []):
            raise cannot_write(self.name, "the tools of a row")
        if tools and self._writes(text, messages, tools[:-1]):
            raise cannot_write(self.name, "more than one of a row's tools")
        unread = set()
        for name in sorted({name for message in messages for name in message} - {"role", "content"}):
            if self._writes(text, [_without(message, name) for message in messages], tools):
                unread.add(name)
        for name in _MUST_BE_WRITTEN:
            if name in unread and any(message.get(name) for message in messages):
                self._check_last(messages, tools, name)
        if "tool_calls" not in unread:
            unread |= self._unread_of_calls(text, messages, tools)
        for name in _keys(tools, _OF_TOOL):
            if self._writes(text, messages, _without_key(tools or (), name.removesuffix(_OF_TOOL))):
                unread.add(name)
        return frozenset(unread)

    def _unread_of_calls(self, text: str, messages: Messages, tools: Tools) -> set[str]:
        """The keys of calls that the template does not write; a name or arguments left out are an error."""
        calls = {index: each for index, message in enumerate(messages) if (each := message.get("tool_calls"))}
        for index, of_message in calls.items():
            fewer = [*messages[:index], messages[index] | {"tool_calls": of_message[:-1]}]
            fewer += messages[index + 1 :]
            if len(of_message) > 1 and self._writes(text, fewer, tools):
                raise cannot_write(self.name, f"more than one of tool_calls (of message {index + 1})")
        unread = set()
        for name in sorted(set().union(*(_keys(each, _OF_CALL) for each in calls.values()))):
            key = name.removesuffix(_OF_CALL)
            without = [
                message | {"tool_calls": _without_key(calls[index], key)} if index in calls else message
                for index, message in enumerate(messages)
            ]
            if self._writes(text, without, tools):
                if key in ("name", "arguments"):
                    raise cannot_write(self.name, f"the {key} of tool_calls")
                unread.add(name)
        return unread

    def _writes(self, text: str, messages: Messages, tools: Tools) -> bool:
        """Whether it writes `text` for other messages and tools."""
        try:
            return self._render(messages, tools)[0] == text
        except UserError:
            return False

    def _check_last(self, messages: Messages, tools: Tools, name: str) -> None:
        """Refuse a template that does not write a field even in the last message; some do so only there."""
        index = max(index for index, message in enumerate(messages) if message.get(name))
        head = messages[: index + 1]
        others = [other for other in REASONING if name in REASONING and other != name and head[-1].get(other)]
        if (
            others
            or self._render(head, tools)[0] != self._render([*head[:-1], _without(head[-1], name)], tools)[0]
        ):
            return
        raise cannot_write(self.name, f"{name} (of message {index + 1})")

    def _span(self, messages: Messages, tools: Tools, index: int, text: str) -> tuple[int, int] | None:
        """Where an answer begins and ends; None if the template does not allow that to be found."""
        before = self._render(messages[:index], tools, add_generation_prompt=True)[0]
        after = self._render(messages[: index + 1], tools)[0]
        whole = text.startswith(after) and after.startswith(before)
        return (len(before), len(after)) if whole else None

    def _not_told(self, number: int, *, is_last: bool) -> UserError:
        if is_last:
            why = "what stands before it is not what add_generation_prompt writes"
            cure = "Put"
        else:
            why = "the template writes it differently once more messages follow"
            cure = 'Give all answers but the last "train": false, which leaves them as context; or put'
        return UserError(
            f"{self.name}: answer {number} cannot be separated from its prompt: {why}. {cure} " + _MARKS
        )

    def _render(
        self,
        messages: Messages,
        tools: Tools,
        *,
        add_generation_prompt: bool = False,
        check_only: bool = False,
    ) -> tuple[str, list[tuple[int, int]] | None]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.text if tools is None or self.tool_use is None else self.tool_use
        marks = re.search(r"{%-?\s*generation\s*-?%}", template) is not None
        try:
            # Sandboxed, as anyone may have written the template.
            rendered: Any = render_jinja_template(
                conversations=[] if check_only else [messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **dict(self.special_tokens),
            )
        except jinja2.TemplateSyntaxError:
            raise
        except (jinja2.TemplateError, *_OF_EXPRESSIONS) as error:
            told = one_line(error)
            raise UserError(
                f"{self.name}: the template refuses a conversation: {told}. Correct the row, or name another "
                "template with --template"
            ) from None
        if check_only:
            return "", None
        texts, spans = rendered
        return texts[0], [tuple(span) for span in spans[0]] if marks else None


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans without those that begin where another ends, such as a last end token in marks of its own."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        touches = bool(joined) and joined[-1][1] == start
        joined = [*joined[:-1], (joined[-1][0], end)] if touches else [*joined, (start, end)]
    return joined


def _shape(turns: Sequence[Turn], tools: Tools) -> Any:
    """What decides how a template treats fields. Probing every row would double the time."""
    return (
        *((turn.role, bool(turn.said), frozenset(turn.held(*turn.fields))) for turn in turns),
        *(_parts_of(turn.fields.get("tool_calls")) for turn in turns),
        tools is not None and _parts_of(tools),
    )


def _parts_of(objects: Any) -> tuple[frozenset[str], int]:
    """Which keys calls or tools have, and whether there is none, one or more of them."""
    return frozenset(_keys(objects, "")), min(len(objects or ()), 2)


def _keys(objects: Any, suffix: str) -> set[str]:
    """The keys of calls or tools that hold something to write, each with a suffix."""
    flat = [{**each, **_function(each)} for each in objects or () if isinstance(each, dict)]
    return {
        f"{key}{suffix}"
        for each in flat
        for key, value in each.items()
        if key not in ("type", "function") and value not in (None, "", [], {})
    }


def _function(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    return function if isinstance(function, dict) else {}


def _without_key(objects: Sequence[Any], key: str) -> list[Any]:
    """Calls or tools without this key of theirs or of their function."""
    return [
        _without(each, key) | ({"function": _without(_function(each), key)} if _function(each) else {})
        for each in objects
    ]


def _dumped(arguments: Any) -> Any:
    """An object as a template's filter `tojson` writes it."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _message(turn: Turn) -> dict[str, Any]:
    return {"role": turn.role, "content": turn.said, **turn.fields}


def _without(message: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != name}


def _has_marks(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_marks, value.values()))
    if isinstance(value, list):
        return any(map(_has_marks, value))
    return isinstance(value, str) and is_marked(value)


def _without_marks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_marks(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_marks(each) for each in value]
    return unmarked(value) if isinstance(value, str) else value
