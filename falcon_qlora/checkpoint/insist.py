"""Trying again where a disk fails at a run's end: what was trained may be in memory alone."""

from __future__ import annotations

import time
from collections.abc import Callable

from falcon_qlora.checkpoint.checkpointer import Checkpointer
from falcon_qlora.checkpoint.manifest import newest_whole
from falcon_qlora.processes import agreement, stop_signals
from falcon_qlora.terminal.console import note

# Before a try, and how many there are: where a complete checkpoint is left, and where there is none.
SOON_SECONDS, SOON_TRIES = 3.0, 1
PATIENT_SECONDS, PATIENT_TRIES = 10.0, 60
_LOOK_SECONDS = 0.1


def until_written(
    checkpointer: Checkpointer, failure: str, again: Callable[[], str | None], *, step: int, told: str
) -> str | None:
    """Try once more, or for ten minutes if the run has no complete checkpoint.

    Every process calls this alike, and all give up where one is asked to stop meanwhile.

    Args:
        failure: why it failed, the same on all processes.
        again: tries again on all processes, and returns the same, or None if it was written.
        step: that the run has reached.
        told: what could not be written.

    Returns:
        Why the last try failed, or None.
    """

    def has_nothing() -> bool:
        checkpointer.join()
        return newest_whole(checkpointer.folder)[0] is None

    seconds, tries = SOON_SECONDS, SOON_TRIES
    if agreement.from_main_process(has_nothing):
        seconds, tries = PATIENT_SECONDS, PATIENT_TRIES
        note(
            f"{told} ({failure}), and there is no complete checkpoint: make room on the disk of "
            f"{checkpointer.folder.parent}. It is tried again every {seconds:g} s for "
            f"{seconds * tries / 60:g} minutes; Ctrl-C or SIGTERM gives up"
        )
    else:
        note(f"{told} ({failure}); retrying in {seconds:g} s")
    # Of a signal the error that follows tells.
    stop_signals.training_begins(lambda text: None, checkpointer.join)
    for _ in range(tries):
        if any(agreement.met_by_all(_is_asked_to_stop(checkpointer, step, seconds))):
            return failure
        new_failure = again()
        if new_failure is None:
            return None
        failure = new_failure
    return failure


def _is_asked_to_stop(checkpointer: Checkpointer, step: int, seconds: float) -> bool:
    """Wait for so long, or until this process is asked to stop, which it may have been before.

    A second signal ends a process by itself.
    """
    before, deadline = stop_signals.asked_to_stop(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        checkpointer.at(step, 6, "waiting for room on the disk")
        time.sleep(_LOOK_SECONDS)
        if stop_signals.asked_to_stop() is not before:
            return True
    return False
