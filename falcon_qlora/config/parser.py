"""Layer flags, files and recipes into one value for every setting.

Values are converted and checked in the same way from every source; the source is kept for messages.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.files import quoted
from falcon_qlora.common.record_files import SETTINGS, is_record, settings_as_now
from falcon_qlora.common.settings import Setting, settings_of
from falcon_qlora.common.untrusted import YAML_LIMIT_BYTES, parse_yaml, read_text
from falcon_qlora.config import other_names
from falcon_qlora.config.arguments import our_settings
from falcon_qlora.config.trainer_arguments import INSTEAD, TrainerArguments, holds_anyway
from falcon_qlora.config.verbs import VERBS

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
FLAG = "flag"
_NUMBER = re.compile(r"-[\d.][\d.eE+-]*")  # a value, not a flag
_FLAG_OF_FILE = {
    (".jsonl", ".json", ".csv", ".tsv", ".parquet"): "--dataset_name",
    (".yaml", ".yml"): "--config",
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The settings that one source gives.

    Attributes:
        origin: the source as a user would name it: "recipe lambda-7b-4bit", "settings.yaml", "flag".
        values: setting to its converted value.
        rank: a higher rank wins.
        passed_over: keys of the source that are not settings but have values without effect.
    """

    origin: str
    values: dict[str, Any]
    rank: int
    passed_over: tuple[str, ...] = ()

    def where(self, name: str) -> str:
        return f"--{name}" if self.origin == FLAG else f"{name} in {self.origin}"


@dataclass(kw_only=True)
class _Given:
    """A flag as typed, with the words that follow it."""

    flag: str
    words: list[str]


class FalconParser:
    """Parses our settings, the trainer's, and those that one command adds.

    Args:
        more: dataclasses of settings that only this command has; flags only, not keys of files. A setting
            with the name of a shared one replaces it.
    """

    def __init__(self, *more: type):
        extra = {each.name: each for arguments in more for each in settings_of(arguments)}
        shared = [*our_settings(), *settings_of(TrainerArguments)]
        self.extra_names = extra.keys()
        self.replaced: list[str] = []  # by `read_flags`: a sentence for each flag that a later one replaced
        self._hidden = extra.keys() & {each.name for each in shared}
        self.settings = {each.name: each for each in shared} | extra
        self._of_flag = {
            flag: each for each in self.settings.values() for flag in (*each.flags, *each.flags_off)
        }
        self.key_of = {
            _spelled(flag.lstrip("-")): each.name
            for each in self.settings.values()
            for flag in each.flags
            if flag.startswith("--")
        }

    def read_flags(self, argv: list[str]) -> dict[str, Any]:
        """The settings that a command line gives, converted.

        Raises:
            UserError: for unknown or abbreviated flags, stray words, and values that do not fit, all at once.
        """
        values: dict[str, Any] = {}
        given: dict[str, str] = {}
        typed: dict[str, _Given] = {}
        faults: list[str] = []
        for each in self._split(argv):
            if not each.flag:
                faults.append(_stray(each.words[0]))
                continue
            setting = self._of_flag.get(each.flag)
            if setting is None:
                faults.append(self._unknown(each.flag, each.words))
                continue
            earlier = given.setdefault(setting.name, each.flag)
            try:
                if _spelled(earlier) != _spelled(each.flag):
                    raise _same(earlier, each.flag)
                if setting.name == "config" and "config" in values:
                    raise UserError("--config is given twice; give one file")
                value = self._read(setting, self._value(setting, each), each.flag)
                if values.setdefault(setting.name, value) != value:
                    self.replaced.append(_replaced(setting, each, typed[setting.name]))
                typed[setting.name] = each
                values[setting.name] = value
            except UserError as error:
                faults.append(str(error))
        refuse(faults)
        return values

    def _split(self, argv: list[str]) -> list[_Given]:
        """The flags of a command line, each with its words; a word without a flag gets the flag ""."""
        found: list[_Given] = []
        most = 0  # words that the last flag may still take
        for word in argv:
            if not word.startswith("-") or " " in word.partition("=")[0] or _NUMBER.fullmatch(word):
                if most > 0:
                    found[-1].words.append(word)
                    most -= 1
                else:
                    found.append(_Given(flag="", words=[word]))
                continue
            flag, equals, value = word.partition("=")
            if not flag.startswith("--") and flag[:2] in self._of_flag and not self._abbreviates(flag):
                flag, value = flag[:2], flag[2:] + equals + value  # -b4
                equals = value
            found.append(_Given(flag=flag, words=[value] if equals else []))
            setting = self._of_flag.get(flag)
            one = setting is not None and not setting.is_list
            off = setting is not None and flag in setting.flags_off
            most = 0 if equals or off else 1 if one else len(argv)
        return found

    def _abbreviates(self, flag: str) -> str | None:
        """The flag that ``-model`` abbreviates, as it does not mean ``-m odel``."""
        meant = [known for known in self._of_flag if known.startswith(f"-{flag}")]
        return min(meant, key=len) if re.match(r"-[a-z]{3,}", flag) and meant else None

    def _value(self, setting: Setting, given: _Given) -> Any:
        """The value that a flag gives its setting, unconverted."""
        if given.flag in setting.flags_off:
            if given.words:
                raise UserError(f"{given.flag} takes no value")
            return False
        if not given.words:
            if setting.alone is None:
                raise UserError(f"{given.flag}: expected a value ({setting.takes})")
            return setting.alone
        return given.words if setting.is_list else given.words[0]

    def _read(self, setting: Setting, value: Any, where: str) -> Any:
        """Convert and check a value; the message for another tool's value names the one here.

        Raises:
            UserError: if it does not fit.
        """
        (single,) = value if isinstance(value, list) and len(value) == 1 else (value,)
        meant = other_names.of_value(setting.name, single)
        is_path = isinstance(single, str) and setting.kind is str and not setting.choices
        if meant is not None and not (is_path and Path(single).exists()):
            raise UserError(f"{where}: {single!r} is not known; {meant}")
        return setting.read(value, where)

    def read_settings(self, given: Mapping[str, Any]) -> Layer:
        """Settings, by their names or aliases, as the layer of the flags.

        Raises:
            UserError: for unknown names, and values that do not fit, all at once.
        """
        values: dict[str, Any] = {}
        named: dict[str, str] = {}
        faults: list[str] = []
        for key, value in given.items():
            name = self.key_of.get(key)
            if name is None:
                faults.append(self._unknown(f"--{key}", [value]))
                continue
            try:
                if name in named:
                    raise _same(named[name], f"--{key}")
                named[name] = f"--{key}"
                values[name] = self._read(self.settings[name], value, f"--{key}")
            except UserError as error:
                faults.append(str(error))
        refuse(faults)
        return Layer(origin=FLAG, values=values, rank=3)

    def read_file(self, path: Path, origin: str, rank: int) -> Layer:
        """A YAML file of settings as a layer.

        Raises:
            UserError: for a file that cannot be read; and for unknown keys and values that do not fit, all at
                once.
        """
        flags_only = {"config", *self.extra_names}
        known_elsewhere = INSTEAD.keys() | other_names.NAMES.keys()
        values: dict[str, Any] = {}
        passed_over: list[str] = []
        faults: list[str] = []
        file = path.expanduser()
        if not file.exists():
            raise UserError(f"there is no file {path}")
        if file.is_dir():
            inside = file / SETTINGS
            meant = f"did you mean {inside}?" if inside.is_file() else "name the file of settings"
            raise UserError(f"{origin}: this is a folder; {meant}")
        content = parse_yaml(read_text(file, limit_bytes=YAML_LIMIT_BYTES, may_be_pipe=True), origin)
        if isinstance(content.get("format"), int) or is_record(file):  # elsewhere it is an unknown key
            content = settings_as_now(content, origin)
        for key, value in self._without_sections(content):
            name = self.key_of.get(_spelled(key))
            if name in self._hidden:
                continue  # such as the adapter that a run began with: this command opens another
            if name in flags_only:
                faults.append(f"{key} in {origin}: can only be given as the flag --{name}")
            elif name is None and _spelled(key) in known_elsewhere and holds_anyway(_spelled(key), value):
                passed_over.append(key)
            elif name is None:
                faults.append(self._unknown(key, value, f" in {origin}"))
            elif name in values:
                faults.append(f"{origin} gives {name} twice, the second time as {key}; give one of them")
            else:
                try:
                    values[name] = self._read(self.settings[name], value, f"{key} in {origin}")
                except UserError as error:
                    faults.append(str(error))
        if len(faults) > 1:
            faults = [fault.replace(f" in {origin}", "", 1) for fault in faults]
        refuse(faults, f"{origin}: {{}} lines to mend")
        return Layer(origin=origin, values=values, rank=rank, passed_over=tuple(passed_over))

    def _without_sections(self, content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
        """Keys and values; for a section of another tool's file (``train:``), those inside it."""
        for key, value in content.items():
            is_known = _spelled(str(key)) in self.key_of or str(key) in other_names.NAMES
            if isinstance(value, dict) and value and not is_known:
                yield from ((f"{key}.{inner}", of_inner) for inner, of_inner in value.items())
            else:
                yield str(key), value

    def _unknown(self, name: str, value: Any, where: str = "") -> str:
        """The message for an unknown flag or key: what to give instead, by meaning or else by spelling."""
        bare, is_flag = name.lstrip("-"), name.startswith("-")
        if _spelled(bare) in INSTEAD:
            return f"{name}{where} is not taken: {INSTEAD[_spelled(bare)]}"
        unknown = f"unknown {'flag' if is_flag else 'key'} {name}{where}"

        def write(setting: str, given: str) -> str:
            known = self.settings.get(setting)
            given = "" if known and known.secret else given
            if is_flag or setting in self.extra_names or known is None:
                return f"--{setting} {given}".rstrip()
            if given and known.is_list and " " in given:
                given = f"[{', '.join(given.split())}]"
            return f"{setting}: {given}" if given else setting

        told = other_names.answer(bare, value[0] if is_flag and len(value) == 1 else value, write)
        if told is not None:
            return f"{unknown}{told}"
        if is_flag and (whole := self._abbreviates(f"-{bare}")):
            return f"{unknown} (did you mean {whole}?)"
        known = {each: name for each, name in other_names.targets().items() if name in self.settings}
        known |= {key: key for key in [*self.key_of, "help"] if is_flag or key not in self.extra_names}
        of_plain = {other_names.plain(each): each for each in known}
        near = difflib.get_close_matches(other_names.plain(bare), of_plain, n=1, cutoff=0.7)
        if near:
            return f"{unknown} (did you mean {'--' * is_flag}{known[of_plain[near[0]]]}?)"
        return f"{unknown}; --help-all lists every flag" if is_flag else unknown


def _stray(word: str) -> str:
    shown = f"unexpected argument {word!r}"
    if word in VERBS:
        return f"{shown}: one command at a time"
    shown += ": every setting is given by its flag"
    for suffixes, flag in _FLAG_OF_FILE.items():
        if word.endswith(suffixes):
            return f"{shown}, such as {flag} {word}"
    if any(Path(word, name).is_file() for name in ("config.yaml", "adapter_config.json")):
        return f"{shown}, such as --adapter {word}"
    return f"{shown}, see --help-all"


def refuse(faults: Sequence[str], heading: str = "{} things to mend") -> None:
    """Raise the faults: a single one by itself, several on a line each under `heading`."""
    if faults:
        lines = [heading.format(len(faults)), *(f"  {fault}" for fault in faults)]
        raise UserError(*(faults if len(faults) == 1 else lines))


def _replaced(setting: Setting, last: _Given, earlier: _Given) -> str:
    if setting.secret:
        return f"{last.flag} is given twice, and the last one counts"
    counts, not_this = (" ".join(map(quoted, each.words)) or "true" for each in (last, earlier))
    told = f"{last.flag} is given twice: {counts} counts, not {not_this}"
    is_both = setting.is_list and not {*last.words} & {*earlier.words}
    return f"{told}. For both: {last.flag} {not_this} {counts}" if is_both else told


def _same(earlier: str, flag: str) -> UserError:
    return UserError(f"{earlier} and {flag} are the same setting; give one of them")


def _spelled(flag: str) -> str:
    return flag.replace("-", "_")


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
    """The file of a packaged recipe, or the file that `recipe` names.

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
    """For each setting that any layer gives, the value from the highest such layer, and that layer."""
    ordered = sorted(layers, key=lambda layer: layer.rank)
    return {name: (value, layer) for layer in ordered for name, value in layer.values.items()}
