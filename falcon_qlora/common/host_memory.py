"""How much CPU memory this process may take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_MEMINFO, _OWN_GROUPS, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# A control group's files for its limit and its use, and memory.stat's key for cache that can be reclaimed.
_VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_VERSION_2 = "memory.max", "memory.current", "inactive_file"


def free_host_bytes() -> int:
    """Free memory of this machine, or of the process's control groups if they have less."""
    lines = _MEMINFO.read_text(encoding="utf-8").splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError):  # a kernel without control groups
        for line in _OWN_GROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                free += _free_in_groups(_GROUPS / "memory", path, _VERSION_1)
            elif not controllers:
                free += _free_in_groups(_GROUPS, path, _VERSION_2)
    return max(min(free), 0)


def _free_in_groups(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    """What each limit leaves, for a group and its parents as far as they can be read."""
    limit, used, cached = names
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            return
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            most = int((folder / limit).read_text())
            known = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield most - int((folder / used).read_text()) + int(known.get(cached, 0))
