"""One setting: its flags, the values it accepts, and their bounds.

A setting is a field of a dataclass: of a command's arguments or of a method. `setting` makes such a field;
`settings_of` reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from falcon_qlora.common.errors import UserError, nearest

_NAMES = {bool: "true or false", int: "a whole number", float: "a number"}
_TRUTH = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(
    ("no", "false", "f", "n", "0"), False
)
# Of a whole number without a bound of its own: what is counted by it still fits where libraries keep it.
_LARGEST = 2**31 - 1


def setting(default: Any, text: str, *aliases: str, **more: Any) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: the value unless another is given.
        text: for the help page.
        aliases: further flags.
        more: other fields of `Setting`.
    """
    metadata = {"help": text, "aliases": aliases, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one setting accepts, from any source.

    Attributes:
        name: its name in configurations and as a flag.
        field: its name in the dataclass; the same, unless another name was given.
        flags: flags that give it a value.
        flags_off: flags that take no value and switch it off.
        kind: bool, int, float, str or dict; for a list, the type of its items.
        optional: whether None is a value.
        alone: the value of its flag on its own; None if the flag needs a value.
        least, above, most, below: bounds of a number.
        secret: its value is neither recorded nor repeated in a message.
        label: how it is shown to a reader, such as ``alpha {}``, where ``{}`` is the value.
        decisive: a run resumed with another value would be another run.
        alternative: name of a setting that replaces it. Of the two, the one from the higher layer (flag,
            file, recipe) unsets the other.
        needed: its command does nothing without it.
        in_weights: for a method: with another value, its trained weights would differ or compute something
            else.
    """

    name: str
    field: str
    flags: tuple[str, ...]
    flags_off: tuple[str, ...]
    kind: type
    is_list: bool
    optional: bool
    default: Any
    help: str
    group: str
    choices: tuple[str, ...] | None = None
    alone: Any = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    secret: bool = False
    label: str = "{}"
    decisive: bool = False
    alternative: str | None = None
    needed: bool = False
    in_weights: bool = True

    def read(self, value: Any, where: str) -> Any:
        """Convert and check a value from a flag, a file or a caller.

        Raises:
            UserError: if it has the wrong type, is not one of the choices or lies outside the bounds.
        """
        read = self._converted(value, where)
        for number in read if isinstance(read, list) else [read]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                self._check_bounds(number, where)
        return read

    def _converted(self, value: Any, where: str) -> Any:
        if value is None:
            if self.optional:
                return None
            raise UserError(f"{where}: needs a value ({self.takes})")
        if self.kind is dict:
            return _read_dict(value, where)
        if self.is_list:
            items = list(value) if isinstance(value, list | tuple) else [value]
            if not items:
                raise UserError(f"{where}: the list is empty")
            return [self._read_one(item, where) for item in items]
        if value is True and isinstance(self.alone, str):
            return self.alone
        return self._read_one(value, where)

    def _check_bounds(self, number: float, where: str) -> None:
        if isinstance(number, float) and not math.isfinite(number):  # an int may be too large for `isfinite`
            raise UserError(f"{where}: {number} is not a finite number")
        whole = isinstance(number, int)
        least = -_LARGEST if self.least is None and self.above is None and whole else self.least
        most = _LARGEST if self.most is None and self.below is None and whole else self.most
        if least is not None and number < least:
            raise UserError(f"{where}: {number} is too small; at least {least:.10g}")
        if self.above is not None and number <= self.above:
            raise UserError(f"{where}: {number} is too small; it must be above {self.above:g}")
        if most is not None and number > most:
            raise UserError(f"{where}: {number} is too large; at most {most:.10g}")
        if self.below is not None and number >= self.below:
            raise UserError(f"{where}: {number} is too large; it must be below {self.below:g}")

    def told(self, value: Any) -> str:
        """`value` as shown to a reader; "" for a switch that is off, or a value not given."""
        if value is None or value is False:
            return ""
        shown = ", ".join(value) if isinstance(value, list | tuple) else value
        return self.label.format(f"{shown:g}" if isinstance(shown, float) else shown)

    @property
    def takes(self) -> str:
        """The kind of value it takes, for a message."""
        return f"one of {', '.join(self.choices)}" if self.choices else _NAMES.get(self.kind, "text")

    def _read_one(self, value: Any, where: str) -> Any:
        if isinstance(value, dict | list | tuple) or (isinstance(value, bool) and self.kind in (int, float)):
            raise UserError(f"{where}: {self._shown(value)} is not {self.takes}")
        if isinstance(value, bool) and self.kind is str:
            # YAML reads a bare no as false.
            value = "no" if value is False and "no" in (self.choices or ()) else str(value).lower()
        text = str(value)
        if self.kind is str and not text.strip() and self.default != "":  # a shell's variable that is not set
            advice = "" if self.needed else "leave it out, or "
            raise UserError(f"{where}: the value is empty; {advice}give {self.takes}")
        if self.optional and not self.is_list and self.kind is not str and text.lower() in ("none", "null"):
            return None
        try:
            converted = _TRUTH[text.lower()] if self.kind is bool else self.kind(text)
        except (ValueError, KeyError):
            shown = f"{where}: {self._shown(text)} is not {self.takes}"
            raise UserError(shown + (_written_out(text) if self.kind is int else "")) from None
        if self.choices is not None and converted not in self.choices:
            raise UserError(
                f"{where}: {text!r} is not one of {', '.join(self.choices)}{nearest(text, self.choices)}"
            )
        return converted

    def _shown(self, value: Any) -> str:
        return "what is given" if self.secret else repr(value)


@functools.cache
def settings_of(arguments: type) -> tuple[Setting, ...]:
    """The settings of a dataclass: the fields made by `setting`."""
    return tuple(_settings_of(arguments))


def _settings_of(arguments: type) -> Iterator[Setting]:
    hints = typing.get_type_hints(arguments)
    group = getattr(arguments, "_argument_group_name", "This command")
    for field in dataclasses.fields(arguments):
        if "help" not in field.metadata:
            continue
        more = {"group": group, "name": field.name, **field.metadata}
        hint, optional = _without_none(hints[field.name])
        is_list = typing.get_origin(hint) in (list, tuple)
        kind = typing.get_args(hint)[0] if is_list else hint
        if typing.get_origin(kind) is typing.Literal:
            more["choices"], kind = typing.get_args(kind), str
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if kind is bool:
            more.setdefault("alone", True)
        yield Setting(
            field=field.name,
            flags=(*_spellings(more["name"]), *more.pop("aliases", ())),
            flags_off=_spellings(f"no_{more['name']}") if default is True else (),
            kind=typing.get_origin(kind) or kind,
            is_list=is_list,
            optional=optional,
            default=default,
            help=more.pop("help", ""),
            **more,
        )


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A type without None, and whether it may be None."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint, False
    (inner,) = (member for member in typing.get_args(hint) if member is not type(None))
    return inner, True


def _spellings(name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _written_out(text: str) -> str:
    """A hint for ``1e9`` or ``10.0``, which Python does not read as a whole number."""
    try:
        number = float(text)
    except ValueError:
        return ""
    return f"; write it out: {number:.0f}" if number.is_integer() else ""


def _read_dict(value: Any, where: str) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r} is not a mapping (as a flag: JSON, such as '{{\"key\": 1}}')")
    return value
