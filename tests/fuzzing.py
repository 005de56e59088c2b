"""Files changed at random, and what their reader may do then: read them, or refuse them in one line.

`FUZZ_TIMES=100` in the environment gives each property so many times its examples, and `FUZZ_SEED=random`
other ones each time; without them a run of the tests has always the same.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gzip
import json
import os
import pickle
import re
import resource
import select
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from falcon_qlora.common.errors import UserError

SECONDS = 20
_ROOM_BYTES = 2**32
_IN_OPEN = 0x20
# Beside each folder that is changed: a file that nothing may open.
SECRET = "secret.json"
EXPLODED = "exploded"


def fuzz(examples: int) -> settings:
    """Hypothesis' settings for so many examples."""
    return settings(
        max_examples=examples * int(os.environ.get("FUZZ_TIMES", "1")),
        deadline=None,  # `guarded` has one, which ends what hangs
        derandomize=os.environ.get("FUZZ_SEED") != "random",
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class HangError(BaseException):
    """Not an Exception, which a reader might take for what is wrong with its file."""


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path | str = EXPLODED):
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**40, 10**4200, 1e308, float("nan"), float("inf")])
    | st.floats(allow_nan=True)
    | st.text(max_size=12)
    | st.sampled_from(
        [
            *(
                "",
                "../x",
                f"../{SECRET}",
                "/etc/passwd",
                "/",
                ".",
                "\x00",
                "a" * 300,
                "9" * 5000,
                "~nobody/x",
                "\ud800",
            ),
            *("falcon", "default", "tiny", "a/b", "random:falcon-7b?hidden_size=9", "{{ 1 }}", "1e3", "x\ny"),
        ]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def tensors() -> st.SearchStrategy[torch.Tensor]:
    """Small tensors of any shape and kind."""
    shapes = st.lists(st.integers(0, 5), max_size=3)
    kinds = [torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]
    return st.builds(
        lambda shape, kind, value: torch.full(shape, value, dtype=torch.float32).to(kind),
        shapes,
        st.sampled_from(kinds),
        st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e30]),
    )


TORCH = st.recursive(
    JSON | tensors() | st.sampled_from([(), (1, 2), {0: 1}, b"bytes", 1j]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.integers(-1, 3) | st.text(max_size=6), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=4,
)


def changed_tree(draw: Any, tree: Any, values: st.SearchStrategy[Any] = JSON) -> Any:
    """The tree with one place changed: another value or a near one, a key gone, moved or added."""
    if not isinstance(tree, dict | list | tuple) or not tree or draw(st.integers(0, 9)) == 0:
        return _other_value(draw, tree, values)
    if isinstance(tree, tuple):
        return tuple(changed_tree(draw, list(tree), values))
    tree = copy.copy(tree)
    keys = list(tree) if isinstance(tree, dict) else list(range(min(len(tree), 50)))
    key = draw(st.sampled_from(keys))
    how = draw(st.sampled_from(["inside"] * 5 + ["gone", "added"]))
    if how == "inside":
        tree[key] = changed_tree(draw, tree[key], values)
    elif how == "gone":
        del tree[key]
    elif isinstance(tree, dict):
        tree[draw(st.text(max_size=6) | st.just("auto_map"))] = draw(values)
    else:
        tree.append(tree[key] if draw(st.booleans()) else draw(values))
    return tree


def _other_value(draw: Any, value: Any, values: st.SearchStrategy[Any]) -> Any:
    near: list[Any] = [[value], {"a": value}]
    if isinstance(value, int | float):
        near += [value + 1, value - 1, -value, value * 1000, str(value), float(value), bool(value)]
    if isinstance(value, str):
        near += [value + "x", value + "\n", value.upper(), f"../{value}", value[:-1]]
    if isinstance(value, torch.Tensor):
        near += [value[:1] if value.dim() else value[None], value.double(), value.long(), value.tolist()]
        near += [value.reshape(-1), value.mT if value.dim() > 1 else value.clone()]
    return draw(st.sampled_from(near) if draw(st.booleans()) else values)


def with_bytes_changed(draw: Any, file: Path) -> None:
    """A few bytes are others, often at the beginning, where the structure is; or the end is missing."""
    content = bytearray(file.read_bytes()) or bytearray(b"x")
    within = draw(st.sampled_from([3000, len(content)]))
    for _ in range(draw(st.integers(1, 3))):
        content[draw(st.integers(0, min(len(content), within) - 1))] = draw(st.integers(0, 255))
    keep = draw(st.sampled_from([len(content)] * 3 + [len(content) // 2, 9, 0]))
    file.write_bytes(bytes(content[:keep]))


def with_content_changed(draw: Any, file: Path) -> None:
    """What the file says is changed, and it is written in its form again."""
    suffix = file.suffix
    if suffix == ".json":
        content = json.loads(file.read_text())
        file.write_text(json.dumps(_changed(draw, content, JSON)))
    elif suffix == ".gz":
        content = json.loads(gzip.decompress(file.read_bytes()))
        file.write_bytes(gzip.compress(json.dumps(_changed(draw, content, JSON)).encode(), 1))
    elif suffix in (".yaml", ".yml"):
        content = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump(_changed(draw, content, JSON), allow_unicode=False))
    elif suffix == ".pt":
        content = torch.load(file, weights_only=True)
        changed = TORCH if draw(st.integers(0, 9)) else st.just(Bomb(file.parent.parent / EXPLODED))
        torch.save(_changed(draw, content, changed), file)
    elif suffix == ".jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines = _changed(draw, lines, JSON)
        file.write_text(
            "".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else []))
        )
    elif suffix == ".safetensors":
        _change_header(draw, file)
    else:
        text = file.read_text(encoding="utf-8")
        place = draw(st.integers(0, len(text)))
        inserted = draw(st.text(max_size=8) | st.sampled_from(['"', "{{", "{%", "\x00", "---\n", "&a *a"]))
        file.write_bytes((text[:place] + inserted + text[place:]).encode("utf-8", "surrogatepass"))


def _changed(draw: Any, content: Any, values: st.SearchStrategy[Any]) -> Any:
    if draw(st.integers(0, 14)) == 0:
        return draw(values)
    for _ in range(draw(st.integers(1, 2))):
        content = changed_tree(draw, content, values)
    return content


def _change_header(draw: Any, file: Path) -> None:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(_changed(draw, header, JSON)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def _become_other_kind(draw: Any, file: Path, *, named_by_user: bool) -> None:
    """In the file's place something that is none."""
    file.unlink()
    outside = file.parent.parent / SECRET
    makers: dict[str, Callable[[], Any]] = {
        "folder": file.mkdir,
        "pipe": lambda: os.mkfifo(file),
        "link out": lambda: file.symlink_to(outside),
        "dangling link": lambda: file.symlink_to("nowhere"),
        "link to itself": lambda: file.symlink_to(file.name),
        "device": lambda: file.symlink_to("/dev/zero"),
        "nothing": lambda: None,
        "pickle": lambda: file.write_bytes(pickle.dumps(Bomb(file.parent.parent / EXPLODED))),
        # Those of tensors are mapped, which takes addresses alone.
        "huge": lambda: _sparse(file, 2**31 if file.suffix == ".safetensors" else 2**36),
    }
    waited_for = ("pipe", "device", "link out", "link to itself")
    kinds = [name for name in sorted(makers) if not (named_by_user and name in waited_for)]
    makers[draw(st.sampled_from(kinds))]()


def _sparse(file: Path, size: int) -> None:
    with file.open("wb") as opened:
        opened.truncate(size)


def change(draw: Any, file: Path, *, named_by_user: bool = False) -> None:
    """Change `file` in one of many ways.

    Args:
        draw: of `st.data()`.
        file: to change.
        named_by_user: who may name a link, a pipe or a device, and wait for it.
    """
    how = draw(st.sampled_from(["content"] * 4 + ["bytes"] * 2 + ["kind"]))
    if how == "content":
        try:
            with_content_changed(draw, file)
        except (TypeError, ValueError, yaml.YAMLError):  # a value that this kind of file cannot hold
            with_bytes_changed(draw, file)
    elif how == "bytes":
        with_bytes_changed(draw, file)
    else:
        _become_other_kind(draw, file, named_by_user=named_by_user)


def fresh_copy(good: Path, scratch: Path) -> Path:
    """A copy of a folder to change, with a file beside it that nothing may open."""
    place = scratch / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / SECRET).write_text('{"a": "secret"}')
    return shutil.copytree(good, place / "copy", symlinks=True)


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """End what takes too long or too much memory, and fail where something was executed, or a secret opened.

    Args:
        folder: from `fresh_copy`.
    """
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)

    def too_long(*_: Any) -> None:
        raise HangError(f"took more than {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, too_long)
    place = Path.cwd()
    os.chdir(folder)  # so that what leads out by .. comes to the file beside it
    watched = _Watch(folder.parent / SECRET)
    if not torch.cuda.is_available():  # whose driver reserves more than there is
        resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM_BYTES, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.chdir(place)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
        opened = watched.was_opened()
    assert not opened, "a file outside of the folder was opened"
    assert not (folder.parent / EXPLODED).exists(), "a crafted file was executed"
    assert not (folder / EXPLODED).exists(), "a crafted file was executed"


class _Watch:
    """Whether a file is opened, by whatever library: inotify says so."""

    def __init__(self, file: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watches = libc.inotify_add_watch(self._handle, os.fsencode(file), _IN_OPEN) >= 0

    def was_opened(self) -> bool:
        readable = self._watches and bool(select.select([self._handle], [], [], 0)[0])
        os.close(self._handle)
        return readable


def read_or_refused(
    folder: Path, read: Callable[[], Any], *, lines: int = 1, or_about: tuple[str, ...] = ()
) -> Any:
    """What `read` returns; None where it refuses `folder`.

    Args:
        folder: from `fresh_copy`.
        read: may raise a `UserError` alone.
        lines: its message has at most so many, and the first names a file of the folder,
        or_about: or begins with one of these.
    """
    with guarded(folder):
        try:
            return read()
        except UserError as error:
            told = str(error)
    if of_settings := re.match(r".*: (\d+) lines to mend\n", told):
        lines = 1 + int(of_settings[1])
    assert len(told.splitlines()) <= lines, f"not one line: {told!r}"
    first = told.splitlines()[0]
    assert folder.name in first or first.startswith(or_about), f"names no file: {told!r}"
    assert len(told) < 2000 + 4 * len(str(folder)), f"tells too much: {told[:3000]!r}"
    return None
