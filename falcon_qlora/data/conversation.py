"""Read a row's messages as turns of a conversation: who speaks, what is said, what is learned."""

from __future__ import annotations

import datetime
import decimal
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from falcon_qlora.common.errors import UserError, nearest, one_line
from falcon_qlora.data.account import Account, count
from falcon_qlora.data.json_rows import kind, parse_json, tidied
from falcon_qlora.data.special_text import clean
from falcon_qlora.data.templates import REASONING, Role, Turn

# Columns of Parquet may hold numbers and dates, which become text as Python writes them.
_DATES = (datetime.date, datetime.time, datetime.timedelta)
_AS_TEXT = (str, int, float, decimal.Decimal, *_DATES)

_APART = (
    "If some rows hold texts there and others lists, put each kind into a file of its own and name both with "
    "--dataset_name"
)
_CALLS = ("function_call", "tool_call")
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", *_CALLS), "assistant"),
    **dict.fromkeys(("bard", "bing", "ai"), "assistant"),  # of ShareGPT and LangChain
    # developer: OpenAI's newer name for system.
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "ipython"), "tool"),
}
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
_TEXT_PARTS = ("text", "input_text", "output_text")  # the latter in OpenAI's Responses


class Missing(Exception):
    """A row lacks something that training needs; the message names it."""


def turns_of_messages(value: Any, place: str, account: Account) -> list[Turn]:
    """The turns of a list of {role, content} or {from, value}, in any mixture, or of its JSON text.

    Answers that are empty or marked as not to be learned (`_marks`) stay as context only.

    Args:
        value: the column's value.
        place: names it in messages.
        account: counts keys that are not read, and marks.

    Raises:
        UserError: if it is not a list of such messages.
        Missing: if a message's text is null.
    """
    return [
        _turn(message, f"{place}: message {number}", account)
        for number, message in enumerate(_list_of("messages", value, place), start=1)
    ]


def _json(what: str, value: Any, place: str) -> Any:
    """`value`, or what its JSON text says, as tables of text hold lists."""
    if not isinstance(value, str):
        return value
    expected = f"expected {what}, or its JSON text as json.dumps writes it"
    if value.lstrip()[:1] not in ("[", "{"):
        told = " ".join(value.split())[:40]
        raise UserError(f"{place}: {expected}; found the text {told!r}. {_APART}")
    found = tidied(parse_json(value, place, f"; {expected}"), place)
    if clean(found) != found:  # in a value that is no JSON text, such rows are counted
        raise UserError(f"{place}: it spells half a surrogate pair (such as \\ud800), which is no character")
    return found


def _list_of(what: str, value: Any, place: str) -> Sequence[Any]:
    found = _json(f"a list of {what}", value, place)
    if not isinstance(found, list | tuple):
        hint = ": write one object for each, [{…}, {…}]" if isinstance(found, Mapping) else ""
        raise UserError(f"{place}: expected a list of {what}, found {kind(found)}{hint}")
    return found


def _objects(what: str, value: Any, place: str) -> list[Any]:
    """A list of objects, each of which may be JSON text."""
    found = [
        _json("an object", each, f"{place}: {number}")
        for number, each in enumerate(_list_of(what, value, place), start=1)
    ]
    for number, each in enumerate(found, start=1):
        if not isinstance(each, dict):
            raise UserError(f"{place}: {number}: expected an object, found {kind(each)}")
    return found


def _turn(message: Any, where: str, account: Account) -> Turn:
    if not isinstance(message, Mapping) or not (role_key := _first(_ROLE_KEYS, message)):
        raise UserError(f"{where}: expected {{role, content}} or {{from, value}}, found {kind(message)}")
    fields = {str(key): each for key, each in message.items() if each is not None}
    if fields.get(role_key, "") == "":
        raise UserError(f"{where}: its role is missing ({role_key} is {json.dumps(message[role_key])})")
    name = str(fields.pop(role_key))
    role = _ROLES.get(name.lower())
    if role is None:
        raise UserError(
            f"{where}: unknown {role_key} {name!r}{nearest(name, _ROLES)}; known are {', '.join(_ROLES)}"
        )
    text_key = _first(_TEXT_KEYS, message)
    content = fields.pop(text_key, None) if text_key else None
    if name.lower() in _CALLS:
        fields["tool_calls"], content = _calls(content, where), None
    elif role == "assistant" and fields.get("function_call") and not fields.get("tool_calls"):
        # OpenAI's form before tool_calls. Beside those it stays, and is named as not read.
        fields["tool_calls"] = _calls(fields.pop("function_call"), where)
    if "tool_calls" in fields:
        fields["tool_calls"] = _objects("calls", fields["tool_calls"], f"{where}: tool_calls")
    says_more = bool(fields.get("tool_calls")) or any(fields.get(key) for key in REASONING)
    if content is None and not says_more:
        if text_key is None:
            raise UserError(
                f"{where}: it has no text: there is neither content nor value nor tool_calls in "
                f"{kind(message)}"
            )
        raise Missing("text of a message")
    for part in content if isinstance(content, list) else ():
        for key in set(part) - {"type", "text"} if isinstance(part, Mapping) else ():
            if part[key] is not None:
                count(account.message_keys, f"{key} of a part")
    marks = _marks(fields, where)
    wanted = all(marks.values())
    for key in marks:
        if not wanted:
            count(account.marks, key)
        elif role != "assistant":
            count(account.message_keys, f"{key} of a {role}'s message")
    text = "" if content is None else text_of(content, where)
    if content is None:
        fields["content"] = None
    return Turn(role, text, train=(bool(text.strip()) or says_more) and wanted, fields=fields)


def _first(keys: Sequence[str], message: Mapping[Any, Any]) -> str | None:
    """The first key with a value, else the first that is present."""
    there = [key for key in keys if key in message]
    return next((key for key in there if message[key] is not None), there[0] if there else None)


_LEARNED = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def _marks(fields: dict[str, Any], where: str) -> dict[str, bool]:
    """Read the keys that say whether a message is learned, and remove them from `fields`.

    OpenAI uses `weight`, others `train`. `loss` (ms-swift) and `trainable` may mean something else elsewhere,
    so they are read only if true or false.
    """
    said: dict[str, Any] = {key: fields.pop(key) for key in ("weight", "train") if key in fields}
    for key in ("loss", "trainable"):
        if isinstance(fields.get(key), bool):
            said[key] = fields.pop(key)
    said = {key: float(value) if isinstance(value, float) else value for key, value in said.items()}
    for key, value in said.items():
        if str(value).lower() not in _LEARNED:
            raise UserError(
                f"{where}: {key} is {'empty' if value == '' else one_line(value, limit=40)}; it can be 0 or "
                "1, or false or true: a message is trained or it is not"
            )
    marks = {key: _LEARNED[str(value).lower()] for key, value in said.items()}
    if len(set(marks.values())) > 1:
        told = " and ".join(f"{key} is {one_line(json.dumps(value))}" for key, value in said.items())
        raise UserError(f"{where}: {told}: one says to train the message, one not to; leave one of them out")
    return marks


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """ShareGPT's function_call, one or several as JSON text, in the form of OpenAI's tool_calls."""
    found = _json("a function call", value, f"{where}: a function call")
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(f"{where}: expected a function call {{name, arguments}}, found {kind(found)}")
    return [{"type": "function", "function": call} for call in calls]


def with_arguments(turn: Turn, change: Callable[[Any], Any]) -> Turn:
    """`turn` with the arguments of its tool calls changed."""

    def changed(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return call | {"function": changed(call["function"])}
        return call | {"arguments": change(call["arguments"])} if "arguments" in call else call

    calls = turn.fields.get("tool_calls")
    if not calls:
        return turn
    return replace(turn, fields={**turn.fields, "tool_calls": [changed(call) for call in calls]})


def parsed(arguments: Any) -> Any:
    """The object that JSON text says; text that says none stays as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = clean(tidied(parse_json(arguments, ""), ""))
    except UserError:
        return arguments
    return found if isinstance(found, dict) else arguments


def tools_of(value: Any, place: str) -> list[Any] | None:
    """The `tools` of a row: a list, or the JSON text of one; None if there are none.

    Raises:
        UserError: for anything else.
    """
    return None if value in (None, "", "null") else _objects("tools", value, place)


def turns_of_history(value: Any, place: str) -> list[Turn]:
    """LLaMA-Factory's `history`: earlier turns as a list of [user's message, answer], learned too.

    Raises:
        UserError: for anything else.
        Missing: if one of them is null.
    """
    if value in (None, ""):
        return []
    turns = []
    for number, pair in enumerate(_list_of("[user, assistant]", value, place), start=1):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise UserError(f"{place}: pair {number}: expected [user, assistant], found {kind(pair)}")
        if None in pair:
            raise Missing("text of history")
        user, answer = (text_of(each, f"{place}: pair {number}") for each in pair)
        turns += [Turn("user", user), Turn("assistant", answer, train=bool(answer.strip()))]
    return turns


def masked_roles(value: Any, place: str) -> set[Role] | None:
    """The roles whose turns NeMo's `mask` leaves out of the loss; None if the column holds something else.

    Raises:
        UserError: for an unknown role.
    """
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    for name in names:
        if name.lower() not in _ROLES:
            raise UserError(
                f"{place}: unknown role {name!r}{nearest(name, _ROLES)}: it names the role whose turns are "
                f"not trained; known are {', '.join(_ROLES)}"
            )
    return {_ROLES[name.lower()] for name in names}


def with_system(turns: list[Turn], prompts: Collection[str]) -> list[Turn]:
    """`turns` preceded by the system prompts of other columns, except those that they begin with."""
    said = {turn.text for turn in itertools.takewhile(lambda turn: turn.role == "system", turns)}
    different = [prompt for prompt in dict.fromkeys(prompts) if prompt.strip() and prompt not in said]
    return [*(Turn("system", prompt) for prompt in different), *turns]


def text_of(value: Any, place: str) -> str:
    """A value as text: a text, number or date, or a list of text parts, which are joined as they are.

    Raises:
        UserError: for anything else.
    """
    if isinstance(value, list) and (not value or any(map(_is_part, value))):
        return "".join(_text_of_part(part, f"{place}: part {number}") for number, part in enumerate(value, 1))
    if isinstance(value, bool) or not isinstance(value, _AS_TEXT):
        hint = f". {_APART}" if isinstance(value, list) else ""
        raise UserError(f"{place}: expected text, found {kind(value)}{hint}")
    return str(value)


def is_unspelled(value: Any) -> bool:
    """Whether a value becomes text in Python's spelling, as its table keeps none; JSON has a `Number`."""
    return type(value) is float or isinstance(value, _DATES)


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and ("type" in value or "text" in value)


def _text_of_part(part: Any, place: str) -> str:
    name, text = (part.get("type"), part.get("text")) if _is_part(part) else (None, None)
    if isinstance(name, str) and name not in _TEXT_PARTS:
        told = one_line(name, limit=40)
        raise UserError(f"{place} is of type {told}: only text is trained; take the part or the row out")
    if name is None or not isinstance(text, str):
        raise UserError(f"{place}: expected {{type: text, text}}, found {kind(part)}")
    return text
