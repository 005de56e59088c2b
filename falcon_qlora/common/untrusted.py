"""Reading files that others may have written: refused unless small, plain and inside their folder."""

from __future__ import annotations

import contextlib
import json
import re
import stat
import sys
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from falcon_qlora.common.errors import UserError, one_line

# Larger than any model's configuration, index or tokenizer.
JSON_LIMIT_BYTES = 2**26
# Larger than any settings file; YAML is slow to parse.
YAML_LIMIT_BYTES = 2**18


def read_text(file: Path, *, limit_bytes: int = JSON_LIMIT_BYTES, may_be_pipe: bool = False) -> str:
    """The text in `file`.

    Args:
        file: what to read.
        limit_bytes: a larger one is refused.
        may_be_pipe: accept a pipe too: the user has named it, and waits for it.

    Raises:
        UserError: if it is missing, not a file, too large or not UTF-8.
    """
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode) and not (may_be_pipe and stat.S_ISFIFO(about.st_mode)):
            raise UserError(f"{file} is not a file")
        if about.st_size > limit_bytes:
            raise UserError(
                f"{file} is too large ({about.st_size:,} bytes; limit {limit_bytes:,}); it was not read"
            )
        with file.open("rb") as opened:
            content = opened.read(limit_bytes + 1)
    except FileNotFoundError:
        raise UserError(f"{file} is not there") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # for a name that no file can have
        raise UserError(f"{str(file)!r} cannot be read: {error}") from None
    if len(content) > limit_bytes:  # a pipe, whose size was not known
        raise UserError(f"{file} is too large (limit {limit_bytes:,} bytes)")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not valid: not text in UTF-8 ({error.reason})") from None


def read_json(file: Path, *, limit_bytes: int = JSON_LIMIT_BYTES, not_finite: bool = False) -> dict[str, Any]:
    """The JSON object in `file`.

    Args:
        limit_bytes: refuse a larger one.
        not_finite: accept ``NaN`` and ``Infinity``, as Python writes them.

    Raises:
        UserError: if it is missing, not a file, too large, not UTF-8, not JSON, or not an object.
    """
    text = read_text(file, limit_bytes=limit_bytes)
    try:
        content = json.loads(text, parse_constant=None if not_finite else _no_such_number)
        if "\\u" in text:
            # A lone surrogate cannot be written again, unless it stands for a path's byte that is not UTF-8.
            json.dumps(content, ensure_ascii=False).encode(errors="surrogateescape")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not valid: it holds a JSON {type(content).__name__}, not an object")
    return content


def read_yaml(file: Path) -> dict[Any, Any]:
    """The mapping in a YAML file; {} if it is empty.

    Raises:
        UserError: as `read_json`; and for a key given twice, or an alias.
    """
    return parse_yaml(read_text(file, limit_bytes=YAML_LIMIT_BYTES), str(file))


def parse_yaml(text: str, origin: str) -> dict[Any, Any]:
    """The mapping in `text`; {} if it is empty.

    Args:
        text: YAML.
        origin: where it is from, for messages.

    Raises:
        UserError: if it is not a mapping, gives a key twice, or has an alias or a tag.
    """
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{origin}{line}: not valid YAML: {one_line(error.problem)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: invalid dates and numbers.
        raise UserError(f"{origin}: not valid YAML: {one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{origin}: expected lines of `setting: value`, found a {type(content).__name__}")
    return content


def as_yaml(record: Mapping[str, Any]) -> str:
    """A record as YAML, in the order of its keys; `parse_yaml` and YAML 1.1 read the same in it."""
    return yaml.dump(record, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _StrictLoader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 has them, and refuses a key given twice, of which PyYAML keeps the last.

    So ``010`` is ten and ``1:30`` a text, as users mean them. Aliases are refused: a few lines of them can
    expand beyond any memory. So are numbers of more digits than any setting has: they can be neither shown
    nor computed with. So are tags: PyYAML fails in many ways on a value that is not of its tag, and reads
    numbers of YAML 1.1 and kinds that no setting has.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"*{event.anchor}: aliases are not read; write it out", event.start_mark
            )
        event = self.peek_event()
        if event.tag not in (None, "!"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"{tag}: tags are not read; write a text in quotes, and a number without"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key} is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if len(text) > _DIGITS:
            problem = f"a number of {len(text):,} characters; at most {_DIGITS}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    """Writes a text in quotes that either version of YAML would read as something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Of a next-line character that stands unquoted, PyYAML itself makes a space.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_DIGITS = 100
_INT, _FLOAT, _TIME = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))
# https://yaml.org/spec/1.2.2/#1032-tag-resolution
_NUMBERS = (
    (_INT, re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), "-+0123456789"),
    (
        _FLOAT,
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        "-+.0123456789",
    ),
)
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in (_INT, _FLOAT, _TIME)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Dumper.add_representer(str, _Dumper.represent_str)
_StrictLoader.add_constructor(_INT, _StrictLoader.construct_yaml_int)
for each in (_StrictLoader, _Dumper):
    for number in _NUMBERS:
        each.add_implicit_resolver(*number)


def is_count(value: Any, *, least: int = 0, most: int | None = None) -> bool:
    """Whether `value` is a whole number from `least` to `most`; True and False are not."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and value >= least and (most is None or value <= most)


def is_number(value: Any) -> bool:
    """Whether `value` is a number that a float can hold: finite, and neither True nor False."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # JSON's whole numbers may have any length
    )


def _no_such_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def leads_out(file: Path, folder: Path) -> bool:
    """Whether `file` in `folder` is a link to something outside of it.

    In the hub's cache, a snapshot's files are links to files beside the snapshots: these are not outside.
    """
    if not file.is_symlink():
        return False
    root = next((each.parent for each in folder.absolute().parents if each.name == "snapshots"), folder)
    try:
        return not file.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link to itself
        return True


def refuse_links(folder: Path) -> None:
    """Refuse a folder with files that link outside of it: only its own files may be read or copied.

    Folders in it may be links, as checkpoints may be on another disk.

    Raises:
        UserError: naming the first such file.
    """
    for file in sorted(folder.iterdir()):
        if leads_out(file, folder) and not file.is_dir():
            raise UserError(
                f"{file} is a link that leads out of {folder}; nothing was read. Put a copy in its place"
            )


@contextlib.contextmanager
def of_a_run(folder: Path) -> Iterator[None]:
    """Turn an error of the block, caused by a run's invalid files, into a `UserError` that names the run."""
    refuse_links(folder)
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        told = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{folder}: its files are not valid ({told}); run it again") from None


def file_beside(named_in: Path, name: Any) -> Path:
    """The file called `name` in the folder of `named_in`, which names it.

    Raises:
        UserError: if it is anything but a file name, such as a path that leads out of the folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise UserError(
            f"{named_in} names {str(name)!r}, which is not a file of its own folder; it was not opened"
        )
    return named_in.parent / name
