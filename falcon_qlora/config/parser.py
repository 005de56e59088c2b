"""Flags, files and recipes, laid over each other into one value for every setting.

TRL's parser turns the dataclasses into flags. What it leaves open is closed here: `--config=FILE`, recipes,
aliases given together, choices and types of values from files, abbreviations, and who said what.
"""

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.scripts.utils import TrlParser

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.untrusted import YAML_LIMIT_BYTES, parse_yaml, read_text
from falcon_qlora.config.arguments import OUR_ARGUMENTS
from falcon_qlora.config.library import NOT_TAKEN, SECRETS, LibraryField, library_fields

NUMBERS = ("a whole number", "a number")
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The settings that one source gives.

    Attributes:
        origin: the source as a user would name it: "recipe lambda-7b-4bit", "settings.yaml", "flag".
        values: setting to converted value.
        rank: a higher rank wins.
    """

    origin: str
    values: dict[str, Any]
    rank: int

    def where(self, name: str) -> str:
        return f"--{name}" if self.origin == "flag" else f"{name} in {self.origin}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one setting accepts, from whatever source it comes."""

    name: str
    flags: tuple[str, ...]
    convert: Callable[[str], Any]
    choices: tuple[Any, ...] | None
    is_list: bool
    is_dict: bool
    optional: bool
    default: Any
    help: str
    group: str
    type_name: str

    def read(self, value: Any, where: str) -> Any:
        """Convert and check a value from a flag or a file.

        Raises:
            UserError: if it has the wrong type or is not one of the choices.
        """
        if value is None:
            if self.optional:
                return None
            raise UserError(f"{where}: needs a value ({self.type_name})")
        if self.is_dict:
            return self._read_dict(value, where)
        if self.is_list:
            items = value if isinstance(value, list) else [value]
            if not items:
                raise UserError(f"{where}: the list is empty")
            return [self._read_one(item, where) for item in items]
        return self._read_one(value, where)

    def _read_one(self, value: Any, where: str) -> Any:
        if isinstance(value, (dict, list)) or (isinstance(value, bool) and self.type_name in NUMBERS):
            raise UserError(f"{where}: {self._shown(value)} is not {self.type_name}")
        if isinstance(value, bool) and self.type_name == "text":
            # YAML reads a bare no as false.
            value = "no" if value is False and "no" in (self.choices or ()) else str(value).lower()
        try:
            converted = self.convert(str(value))
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            raise UserError(f"{where}: {self._shown(str(value))} is not {self.type_name}") from None
        if self.choices is not None and converted not in self.choices and converted is not None:
            known = [str(choice) for choice in self.choices]
            raise UserError(
                f"{where}: {str(value)!r} is not one of {', '.join(known)}{nearest(str(value), known)}"
            )
        return converted

    def _shown(self, value: Any) -> str:
        return "what is given" if self.name in SECRETS else repr(value)

    def _read_dict(self, value: Any, where: str) -> Any:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise UserError(
                f"{where}: {value!r} is not a mapping (as a flag: JSON, such as '{{\"key\": 1}}')"
            )
        return value


class _Once(argparse.Action):
    """Store a value; refuse two spellings of one setting, which could contradict each other."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        _note_spelling(namespace, self.dest, option_string)
        setattr(namespace, self.dest, values)


class _OnceFalse(_Once):
    """`--no_NAME`."""

    def __init__(self, option_strings, dest, default=None, help=None):  # type: ignore[no-untyped-def]
        super().__init__(option_strings, dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        super().__call__(parser, namespace, "false", option_string)


def _note_spelling(namespace: argparse.Namespace, dest: str, option: str | None) -> None:
    spelling = (option or dest).replace("-", "_")
    earlier = namespace.__dict__.setdefault("_spellings", {}).setdefault(dest, (spelling, option))
    if earlier[0] != spelling:
        raise UserError(f"{earlier[1]} and {option} are the same setting; give one of them")


class FalconParser(TrlParser):
    """TRL's parser over our dataclasses, SFTConfig's other fields, and what one command adds.

    Args:
        extra_arguments: a dataclass of settings that only this command has; flags only, not keys of files.
    """

    def __init__(self, extra_arguments: type | None = None):
        trainer = _trainer_arguments()
        dataclass_types = [*OUR_ARGUMENTS, trainer, *([extra_arguments] if extra_arguments else [])]
        self.extra_names = {f.name for f in dataclasses.fields(extra_arguments)} if extra_arguments else set()
        super().__init__(dataclass_types, allow_abbrev=False, add_help=False)
        types_by_name = {
            name: (hint, dataclass_type)
            for dataclass_type in dataclass_types
            for name, hint in typing.get_type_hints(dataclass_type).items()
        }
        self.settings: dict[str, Setting] = {}
        for action in self._actions:
            if isinstance(action, _OnceFalse):
                earlier = self.settings[action.dest]
                flags = (*earlier.flags, *action.option_strings)
                self.settings[action.dest] = dataclasses.replace(earlier, flags=flags)
            else:
                hint, owner = types_by_name[action.dest]
                self.settings[action.dest] = _setting_of(action, hint, owner)
            # argparse only splits the command line; values are checked where those from files are too.
            action.default, action.type, action.choices = argparse.SUPPRESS, None, None
        self.key_of = {
            flag.lstrip("-").replace("-", "_"): name
            for name, setting in self.settings.items()
            for flag in setting.flags
            if flag.startswith("--") and not flag.startswith(("--no_", "--no-"))
        }

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        self.register("action", None, _Once)
        self.register("action", "store_false", _OnceFalse)
        super()._add_dataclass_arguments(dtype)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message.replace("argument ", "", 1) if message.startswith("argument -") else message)

    def read_flags(self, argv: list[str]) -> tuple[Layer, str | None]:
        """The command line as a layer, and the file that `--config` names.

        Raises:
            UserError: for an unknown or abbreviated flag, a stray word, or a value that does not fit.
        """
        rest, config_file = _take_config(argv)
        known = [flag for setting in self.settings.values() for flag in setting.flags]
        known += ["--config", "--help", "--help-all"]
        names = [flag.lstrip("-") for flag in known if flag.startswith("--")]
        for word in rest:
            name = word.split("=")[0]
            meant = [flag for flag in known if flag.startswith(f"-{name}")]
            # argparse would read -model as -m odel.
            if re.match(r"-[a-z]{3,}", name) and meant:
                raise UserError(f"unknown flag {name} (did you mean {min(meant, key=len)}?)")
        namespace, unknown = self.parse_known_args(rest)
        for word in unknown:
            name = word.split("=")[0]
            if not word.startswith("-"):
                raise UserError(
                    f"unexpected argument {word!r}: every setting is given by its flag, see --help-all"
                )
            reason = NOT_TAKEN.get(name.lstrip("-").replace("-", "_"))
            if reason:
                raise UserError(f"{name} is not taken: {reason}")
            near = nearest(name.lstrip("-"), names).replace("mean ", "mean --")
            raise UserError(f"unknown flag {name}{near}; --help-all lists every flag")
        spellings = namespace.__dict__.pop("_spellings", {})
        values = {
            name: self.settings[name].read(value, spellings[name][1])
            for name, value in vars(namespace).items()
        }
        return Layer(origin="flag", values=values, rank=3), config_file

    def read_file(self, path: Path, origin: str, rank: int) -> Layer:
        """A YAML file of settings as a layer.

        Raises:
            UserError: for a file that cannot be read, an unknown key, or a value that does not fit.
        """
        values: dict[str, Any] = {}
        for key, value in _read_mapping(path, origin).items():
            canonical = str(key).replace("-", "_")
            if canonical in NOT_TAKEN:
                raise UserError(f"{key} in {origin} is not taken: {NOT_TAKEN[canonical]}")
            name = self.key_of.get(canonical)
            if name in self.extra_names:
                raise UserError(f"{key} in {origin}: can only be given as the flag --{name}")
            if name is None:
                keys = [known for known, target in self.key_of.items() if target not in self.extra_names]
                raise UserError(f"unknown key {key} in {origin}{nearest(canonical, keys)}")
            if name in values:
                raise UserError(f"{origin} gives {name} twice, the second time as {key}; give one of them")
            values[name] = self.settings[name].read(value, f"{key} in {origin}")
        return Layer(origin=origin, values=values, rank=rank)


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


def _trainer_arguments() -> type:
    """SFTConfig's fields that ours do not already hold, as a dataclass TRL's parser can read."""
    ours = {field.name for arguments in OUR_ARGUMENTS for field in dataclasses.fields(arguments)}

    def field_of(library: LibraryField) -> Any:
        metadata: dict[str, Any] = {"help": library.help}
        if library.name == "gradient_checkpointing":
            metadata["aliases"] = ["--activation_checkpointing"]
        if library.kind == "bool" and library.optional:
            metadata |= {"nargs": "?", "const": True}
        return dataclasses.field(default=library.default, metadata=metadata)

    fields = [
        (library.name, library.annotation(), field_of(library))
        for library in library_fields().values()
        if library.name not in ours
    ]
    return dataclasses.make_dataclass(
        "TrainerArguments", fields, namespace={"_argument_group_name": "Trainer"}
    )


def _setting_of(action: argparse.Action, hint: Any, owner: type) -> Setting:
    members = (
        set(typing.get_args(hint)) if typing.get_origin(hint) in (types.UnionType, typing.Union) else {hint}
    )
    library = library_fields().get(action.dest) if owner.__name__ == "TrainerArguments" else None
    inner = next((member for member in members if member is not type(None)), str)
    is_list = typing.get_origin(inner) is list
    element = typing.get_args(inner)[0] if is_list else inner
    names = {bool: "true or false", int: NUMBERS[0], float: NUMBERS[1]}
    return Setting(
        name=action.dest,
        flags=tuple(action.option_strings),
        convert=typing.cast(Callable[[str], Any], action.type),
        choices=tuple(action.choices) if action.choices is not None else None,
        is_list=is_list,
        is_dict=library is not None and library.kind == "dict",
        optional=type(None) in members,
        default=action.default,
        help=action.help or "",
        group=getattr(owner, "_argument_group_name", "This command"),
        type_name=names.get(element, "text"),
    )


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    """Split `--config FILE` or `--config=FILE` off the command line."""
    rest: list[str] = []
    files: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--config":
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise UserError("--config needs a YAML file")
            files.append(following)
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    if len(files) > 1:
        raise UserError("--config is given twice; give one file")
    if files == [""]:
        raise UserError("--config needs a YAML file")
    return rest, files[0] if files else None


def _read_mapping(path: Path, origin: str) -> dict[Any, Any]:
    file = path.expanduser()
    if not file.exists():
        raise UserError(f"there is no file {path}")
    return parse_yaml(read_text(file, limit_bytes=YAML_LIMIT_BYTES, may_be_pipe=True), origin)


def lay_over(layers: Iterable[Layer], names: Iterable[str]) -> dict[str, tuple[Any, Layer]]:
    """For each setting that any layer gives, the value of the highest and that layer."""
    result: dict[str, tuple[Any, Layer]] = {}
    wanted = set(names)
    for layer in sorted(layers, key=lambda layer: layer.rank):
        result.update({name: (value, layer) for name, value in layer.values.items() if name in wanted})
    return result
