"""Throughput by the seconds of the steps and by the wall clock, and peak memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from falcon_qlora.common.quantities import GIB

REFERENCE_SAMPLE_POSITIONS = 512
LOST = ("start", "saves", "evaluation")


@dataclass(kw_only=True)
class Meter:
    """Counts real tokens and computed positions, the seconds of the steps, and the wall clock.

    Time between `pause` and `resume` does not count for the steps: it is kept by its cause.

    Attributes:
        began: seconds since the epoch at which the command began.
        seconds: of the steps, over all starts of the run.
        lost: seconds by what they went to instead: ``start``, ``saves``, ``evaluation``.
    """

    began: float = field(default_factory=time.time)
    tokens: int = 0
    positions: int = 0
    capacity: int = 0
    seconds: float = 0.0
    lost: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOST, 0.0))
    _since: float | None = field(default=None, repr=False)
    _paused: tuple[str, float] | None = field(default=None, repr=False)
    _last: tuple[int, int, int, float] = field(default=(0, 0, 0, 0.0), repr=False)
    _wall_before: float = field(default=0.0, repr=False)
    _seconds_before: float = field(default=0.0, repr=False)
    _logged_at: float | None = field(default=None, repr=False)

    def resume(self) -> None:
        now = self._since = time.perf_counter()
        if self._logged_at is None:  # the first step of this start begins
            self._logged_at = now
            self.lost["start"] += time.time() - self.began
        elif self._paused is not None and self._paused[0] in self.lost:
            cause, at = self._paused
            self.lost[cause] += now - at
            if cause == "start" and self._logged_at is not None:  # part of the first step, told apart
                self._logged_at += now - at
        self._paused = None

    def pause(self, cause: str) -> None:
        """Stop counting time for the steps, unless paused already.

        Args:
            cause: one of `LOST`, or ``end``, whose time is not kept: it is the rest of the wall clock.
        """
        if self._since is not None:
            now = time.perf_counter()
            self.seconds += now - self._since
            self._since, self._paused = None, (cause, now)

    def add(self, *, tokens: int, positions: int, capacity: int) -> None:
        self.tokens += tokens
        self.positions += positions
        self.capacity += capacity

    def interval(self) -> dict[str, float]:
        """Rates since the last call; the caller makes sure that the device is done.

        The wall clock's counts saves and evaluations, and not what belongs to the start.
        """
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
            self._since = now
        since, self._last = self._last, self._now()
        tokens, *rest = (a - b for a, b in zip(self._last, since, strict=True))
        wall = now - (self._logged_at or now)
        self._logged_at = now
        by_wall = {"wall_tokens_per_second": tokens / wall} if wall > 0 else {}
        return _rates(tokens, *rest) | by_wall

    def share_of_this_start(self, seconds: float) -> float:
        """Which share of the steps' time since the command began so many seconds are."""
        ours = self.seconds - self._seconds_before
        return seconds / ours if ours > 0 else 0.0

    def total(self) -> dict[str, float]:
        """Rates over the whole run."""
        return _rates(*self._now())

    def wall_seconds(self) -> float:
        """Seconds of all commands of the run until now, each from its start."""
        return self._wall_before + time.time() - self.began

    def _now(self) -> tuple[int, int, int, float]:
        return self.tokens, self.positions, self.capacity, self.seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the meter is paused."""
        since_log = time.perf_counter() - (self._logged_at or time.perf_counter())
        return {
            "now": list(self._now()),
            "last": list(self._last),
            "lost": dict(self.lost),
            "wall": self.wall_seconds(),
            "since_log": since_log,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned, before the first `resume`."""
        self.tokens, self.positions, self.capacity, self.seconds = state["now"]
        self._seconds_before = self.seconds
        tokens, positions, capacity, seconds = state["last"]
        self._last = (tokens, positions, capacity, seconds)
        self.lost |= state.get("lost", {})
        self._wall_before = state.get("wall", self.seconds)
        if "since_log" in state:
            self.lost["start"] += time.time() - self.began
            self._logged_at = time.perf_counter() - state["since_log"]


def _rates(tokens: float, positions: float, capacity: float, seconds: float) -> dict[str, float]:
    """Tokens/s count real tokens; samples/s count computed positions, 512 each, as the 2023 reference."""
    if seconds <= 0:
        return {}
    return {
        "tokens_per_second": tokens / seconds,
        "samples_per_second_512": positions / REFERENCE_SAMPLE_POSITIONS / seconds,
        "packing_efficiency": tokens / capacity if capacity else 1.0,
    }


def card_gib() -> float | None:
    """GiB in use on this process's GPU, by whatever program, as nvidia-smi counts; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()  # of what the driver leaves
    return (total - free) / GIB


def peak_memory_gib() -> float:
    """Peak GiB that this process reserved on its GPU; without a GPU, its peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
