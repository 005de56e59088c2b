"""Tokens, positions and memory against the seconds that count as training."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from falcon_qlora.common.quantities import GIB

REFERENCE_SAMPLE_POSITIONS = 512


@dataclass(kw_only=True)
class Meter:
    """Counts real tokens and computed positions against the seconds spent training.

    Time between `pause` and `resume` (evaluation, saving) counts for nothing.
    """

    tokens: int = 0
    positions: int = 0
    capacity: int = 0
    seconds: float = 0.0
    _since: float | None = field(default=None, repr=False)
    _last: tuple[int, int, int, float] = field(default=(0, 0, 0, 0.0), repr=False)

    def resume(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def add(self, *, tokens: int, positions: int, capacity: int) -> None:
        self.tokens += tokens
        self.positions += positions
        self.capacity += capacity

    def interval(self) -> dict[str, float]:
        """Rates since the last call; the caller has made sure that the device is done."""
        if self._since is not None:
            self.pause()
            self.resume()
        since, self._last = self._last, self._now()
        return _rates(*(a - b for a, b in zip(self._last, since, strict=True)))

    def total(self) -> dict[str, float]:
        """Rates over the whole run."""
        return _rates(*self._now())

    def _now(self) -> tuple[int, int, int, float]:
        return self.tokens, self.positions, self.capacity, self.seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the meter is paused."""
        return {"now": list(self._now()), "last": list(self._last)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.tokens, self.positions, self.capacity, self.seconds = state["now"]
        tokens, positions, capacity, seconds = state["last"]
        self._last = (tokens, positions, capacity, seconds)


def _rates(tokens: float, positions: float, capacity: float, seconds: float) -> dict[str, float]:
    """Tokens/s count real tokens; samples/s count 512 computed positions, as the 2023 reference did."""
    if seconds <= 0:
        return {}
    return {
        "tokens_per_second": tokens / seconds,
        "samples_per_second_512": positions / REFERENCE_SAMPLE_POSITIONS / seconds,
        "packing_efficiency": tokens / capacity if capacity else 1.0,
    }


def peak_memory_gib() -> float:
    """GiB this process reserved on its GPU at the most; without one, its peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
