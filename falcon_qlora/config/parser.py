"""Flags, files and recipes, laid over each other into one value for every setting.

argparse splits the command line. Values are converted and checked alike from wherever they come, and who said
what is kept for messages.
"""

import argparse
import json
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.record_files import is_record, settings_as_now
from falcon_qlora.common.settings import settings_of
from falcon_qlora.common.untrusted import YAML_LIMIT_BYTES, parse_yaml, read_text
from falcon_qlora.config.arguments import our_settings
from falcon_qlora.config.trainer_arguments import INSTEAD, TrainerArguments, holds_anyway

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
FLAG = "flag"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The settings that one source gives.

    Attributes:
        origin: the source as a user would name it: "recipe lambda-7b-4bit", "settings.yaml", "flag".
        values: setting to converted value.
        rank: a higher rank wins.
        passed_over: keys of the source that are no settings, at values with which they change nothing.
    """

    origin: str
    values: dict[str, Any]
    rank: int
    passed_over: tuple[str, ...] = ()

    def where(self, name: str) -> str:
        return f"--{name}" if self.origin == FLAG else f"{name} in {self.origin}"


class _Once(argparse.Action):
    """Store a value with its spelling; refuse two spellings of one setting, which could contradict."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        _, earlier = getattr(namespace, self.dest, (None, option_string))
        if _spelled(earlier) != _spelled(option_string):
            raise _same(earlier, option_string)
        if self.dest == "config" and hasattr(namespace, "config"):
            raise UserError("--config is given twice; give one file")
        setattr(namespace, self.dest, (self.const if self.nargs == 0 else values, option_string))


def _same(earlier: str, flag: str) -> UserError:
    return UserError(f"{earlier} and {flag} are the same setting; give one of them")


def _spelled(flag: str) -> str:
    return flag.replace("-", "_")


class FalconParser(argparse.ArgumentParser):
    """Our dataclasses, the trainer's, and what one command adds.

    Args:
        extra_arguments: a dataclass of settings that only this command has; flags only, not keys of files.
            One of the name of a shared setting takes its place.
    """

    def __init__(self, extra_arguments: type | None = None):
        super().__init__(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
        extra = {each.name: each for each in settings_of(extra_arguments)} if extra_arguments else {}
        shared = [*our_settings(), *settings_of(TrainerArguments)]
        self.extra_names = extra.keys()
        self._hidden = extra.keys() & {each.name for each in shared}
        self.settings = {each.name: each for each in shared} | extra
        for each in self.settings.values():
            nargs = "+" if each.is_list else "?" if each.alone is not None else None
            self.add_argument(*each.flags, dest=each.name, nargs=nargs, const=each.alone, action=_Once)
            if each.flags_off:
                self.add_argument(*each.flags_off, dest=each.name, nargs=0, const=False, action=_Once)
        self.key_of = {
            _spelled(flag.lstrip("-")): each.name
            for each in self.settings.values()
            for flag in each.flags
            if flag.startswith("--")
        }

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message.replace("argument ", "", 1) if message.startswith("argument -") else message)

    def read_flags(self, argv: list[str]) -> dict[str, Any]:
        """The settings that a command line gives, converted.

        Raises:
            UserError: for an unknown or abbreviated flag, a stray word, or a value that does not fit.
        """
        known = [flag for each in self.settings.values() for flag in (*each.flags, *each.flags_off)]
        for word in argv:
            name = word.split("=")[0]
            meant = [flag for flag in known if flag.startswith(f"-{name}")]
            # argparse would read -model as -m odel.
            if re.match(r"-[a-z]{3,}", name) and meant:
                raise UserError(f"unknown flag {name} (did you mean {min(meant, key=len)}?)")
        namespace, unknown = self.parse_known_args(argv)
        for word in unknown:
            if not word.startswith("-"):
                raise UserError(
                    f"unexpected argument {word!r}: every setting is given by its flag, see --help-all"
                )
            raise self._unknown(word.split("=")[0])
        return {
            name: self.settings[name].read(value, flag) for name, (value, flag) in vars(namespace).items()
        }

    def read_settings(self, given: Mapping[str, Any]) -> Layer:
        """Settings by their names, or other names of their flags, as the layer of the flags.

        Raises:
            UserError: for an unknown name, or a value that does not fit.
        """
        values: dict[str, Any] = {}
        named: dict[str, str] = {}
        for key, value in given.items():
            name = self.key_of.get(key)
            if name is None:
                raise self._unknown(f"--{key}")
            if name in named:
                raise _same(named[name], f"--{key}")
            named[name] = f"--{key}"
            values[name] = self.settings[name].read(value, f"--{key}")
        return Layer(origin=FLAG, values=values, rank=3)

    def read_file(self, path: Path, origin: str, rank: int) -> Layer:
        """A YAML file of settings as a layer.

        Raises:
            UserError: for a file that cannot be read, an unknown key, or a value that does not fit.
        """
        flags_only = {"config", *self.extra_names}
        values: dict[str, Any] = {}
        passed_over: list[str] = []
        file = path.expanduser()
        if not file.exists():
            raise UserError(f"there is no file {path}")
        content = parse_yaml(read_text(file, limit_bytes=YAML_LIMIT_BYTES, may_be_pipe=True), origin)
        if isinstance(content.get("format"), int) or is_record(file):  # a run's; else an unknown key
            content = settings_as_now(content, origin)
        for key, value in content.items():
            canonical = _spelled(str(key))
            if canonical in INSTEAD:
                if holds_anyway(canonical, value):
                    passed_over.append(str(key))
                    continue
                raise UserError(f"{key} in {origin} is not taken: {INSTEAD[canonical]}")
            name = self.key_of.get(canonical)
            if name in self._hidden:
                continue  # what a run began with says nothing to who opens what came of it
            if name in flags_only:
                raise UserError(f"{key} in {origin}: can only be given as the flag --{name}")
            if name is None:
                keys = [known for known, target in self.key_of.items() if target not in flags_only]
                raise UserError(f"unknown key {key} in {origin}{nearest(canonical, keys)}")
            if name in values:
                raise UserError(f"{origin} gives {name} twice, the second time as {key}; give one of them")
            values[name] = self.settings[name].read(value, f"{key} in {origin}")
        return Layer(origin=origin, values=values, rank=rank, passed_over=tuple(passed_over))

    def _unknown(self, flag: str) -> UserError:
        instead = INSTEAD.get(_spelled(flag.lstrip("-")))
        if instead:
            return UserError(f"{flag} is not taken: {instead}")
        flags = [known for each in self.settings.values() for known in (*each.flags, *each.flags_off)]
        names = [known.lstrip("-") for known in (*flags, "--help", "--help-all") if known.startswith("--")]
        near = nearest(flag.lstrip("-"), names).replace("mean ", "mean --")
        return UserError(f"unknown flag {flag}{near}; --help-all lists every flag")


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """The command line that gives these settings."""
    words: list[str] = []
    for name, value in settings.items():
        first, *others = map(_as_word, value if isinstance(value, list) else [value])
        words += [f"--{name}={first}"] if first.startswith("-") else [f"--{name}", first]
        words += others
    return words


def _as_word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | dict) else str(value)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_file(recipe: str) -> Path:
    """The file of a recipe that comes with the package, or the file that was named.

    Raises:
        UserError: if there is neither.
    """
    packaged = RECIPES / f"{recipe}.yaml"
    if recipe in recipe_names():
        return packaged
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in recipe:
        raise UserError(f"--recipe: there is no file {recipe}")
    names = recipe_names()
    raise UserError(f"unknown recipe {recipe}{nearest(recipe, names)}; there are {', '.join(names)}")


def lay_over(layers: Iterable[Layer]) -> dict[str, tuple[Any, Layer]]:
    """For each setting that any layer gives, the value of the highest and that layer."""
    ordered = sorted(layers, key=lambda layer: layer.rank)
    return {name: (value, layer) for layer in ordered for name, value in layer.values.items()}
