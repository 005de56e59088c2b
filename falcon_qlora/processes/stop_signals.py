"""Signals that ask a run to stop: the first has it save and end, a second ends it at once.

    stop_signals.install()                      # in a process of the command line, before anything else
    stop_signals.training_begins(say, finish)   # from here on there is something to save
    stop_signals.all_have_begun()               # on the other processes as well
    stop_signals.asked_to_stop()                # the signal, or None

Python runs signal handlers between two instructions of the main thread, which may be waiting in a collective
for a process that is gone. So a separate thread reads the signals.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from falcon_qlora.common.errors import EXIT_BUG, EXIT_STOPPED, native_work
from falcon_qlora.common.files import remove_temporary_files
from falcon_qlora.processes import early, endings, launcher, lookout, ranks
from falcon_qlora.processes.early import STOP_SIGNALS
from falcon_qlora.processes.launcher import SAME_REQUEST_SECONDS

_LEAVE_SECONDS = 5.0
_AGAIN_SECONDS = 0.05


class Ended(BaseException):
    """A signal ends this command. Not an Exception, which others' code might catch."""

    def __init__(self, number: signal.Signals):
        self.number = number

    def __str__(self) -> str:
        return early.words_for(self.number)


class Stopped(Exception):
    """The run was asked to stop and has saved what it could.

    Attributes:
        step: steps done.
        failure: why that step has no checkpoint, or None.
    """

    def __init__(self, step: int, failure: str | None):
        super().__init__(f"stopped at step {step}")
        self.step = step
        self.failure = failure


class _Requests:
    def __init__(self) -> None:
        self.training = self.stopped = False
        self.first: int | None = None
        self.at = 0.0
        self.say: Callable[[str], None] = lambda text: None
        self.finish: Callable[[], None] = lambda: None

    def receive(self, number: int) -> None:
        """Take in a signal; called by the thread."""
        if not self.training and lookout.watches():
            asked = launcher.mark(launcher.STOPPING)
            if asked is None or asked.exists():  # else its agent ends it, to start it again or after an error
                told = f"error: {Ended(signal.Signals(number))}\n"
                lookout.tell(told, EXIT_BUG, here=asked is None)  # the launcher tells here
            os._exit(128 + number)
        if not self.training:
            # The main thread ends the process. If it is waiting for another one, this timer does.
            timer = threading.Timer(_LEAVE_SECONDS, _leave_to_launcher, [number])
            timer.daemon = True
            timer.start()
            return
        if endings.sibling_died():
            # After one process fails, torchrun ends the others. Nothing more can be saved.
            self.finish()
            os._exit(128 + number)
        if self.first is None:
            self.first, self.at = number, time.monotonic()
            name = signal.Signals(number).name
            self.say(f"{name}: saving at the end of a step, then exiting; send it again to quit now")
        elif time.monotonic() - self.at > SAME_REQUEST_SECONDS:
            os._exit(128 + number)


_requests = _Requests()


# Set by the first signal that Python gets to see.
_heeded = threading.Event()


class _Heeding:
    """A signal's handler that notes that it was called."""

    def __init__(self, handler: Callable[[int, Any], None]):
        self._handler = handler

    def __call__(self, number: int, frame: Any) -> None:
        _heeded.set()
        self._handler(number, frame)


def _leave(number: int) -> None:
    """End this process, whose main thread has not heeded a signal; say what it waits for, if known."""
    name = signal.Signals(number).name
    told = [f"native code does not heed {name}, {work.what}" for work in native_work()[:1]]
    print(f"error: {(told or [early.words_for(number)])[0]}", file=sys.stderr, flush=True)
    remove_temporary_files()
    os._exit(128 + number)


def _leave_to_launcher(number: int) -> None:
    """The same in a rank, whose launcher says that it ended: one message in all."""
    for work in native_work()[:1]:
        if launcher.mark(launcher.NATIVE) is None:
            _leave(number)
        launcher.leave(launcher.NATIVE, work.what)
    os._exit(128 + number)


@contextlib.contextmanager
def sent_again_if_dropped(signals: Mapping[type[BaseException], int]) -> Iterator[None]:
    """Within the block a signal comes again if Python drops what its handler raised.

    It drops what is raised while a `__del__` or a weak reference's callback runs.

    Args:
        signals: what a handler raises → its signal; `Ended` is known.
    """
    timers: list[threading.Timer] = []

    def dropped(unraisable: Any) -> None:
        error = unraisable.exc_value
        number = error.number if isinstance(error, Ended) else signals.get(type(error))
        if number is None:
            hook(unraisable)
            return
        timers.append(threading.Timer(_AGAIN_SECONDS, os.kill, [os.getpid(), number]))
        timers[-1].daemon = True
        timers[-1].start()

    hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for timer in timers:
            timer.cancel()


@contextlib.contextmanager
def stop_signals_raise(*, for_good: bool = False) -> Iterator[None]:
    """Within the block Ctrl-C raises KeyboardInterrupt, and the others of `STOP_SIGNALS` raise `Ended`.

    If native code does not let them, they end the process. A signal that is handled in another way is left
    alone.

    Args:
        for_good: the process ends after the block: what it ignores by then, it goes on to ignore.
    """
    found = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {
        number: handler
        for number, handler in found.items()
        if handler in (signal.SIG_DFL, signal.default_int_handler, early.tell_and_end)
    }
    if threading.current_thread() is not threading.main_thread() or not before:
        yield
        return
    process = os.getpid()
    _heeded.clear()

    def end(number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        if os.getpid() != process:  # a fork, which ends as if there were no handler
            os._exit(128 + number)
        raise Ended(signal.Signals(number))

    def watch() -> None:
        while sent := os.read(reader, 64):
            for number in sent:
                ours = number in before and isinstance(signal.getsignal(number), _Heeding)
                if ours and not _heeded.wait(_LEAVE_SECONDS):
                    _leave(number)
        os.close(reader)

    interrupt = _Heeding(end)
    for number in before:
        signal.signal(number, interrupt)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="stop signals", daemon=True).start()
    try:
        with sent_again_if_dropped({KeyboardInterrupt: signal.SIGINT}):
            yield
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in before.items():
            if not for_good or signal.getsignal(number) is interrupt:
                signal.signal(number, handler)
        os.close(writer)


@contextlib.contextmanager
def stop_signals_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Within the block, `handler` gets the signals that ask a process to stop.

    Within `stop_signals_raise` as well, native code that does not let it be called is ended as there.
    """
    earlier = {number: signal.signal(number, _Heeding(handler)) for number in STOP_SIGNALS}
    try:
        with sent_again_if_dropped({}):
            yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


def end_with(status: int) -> None:
    """From here on a stop signal ends this process with `status`: it has only to shut down.

    After Ctrl-C it does so here: Python would by itself end by the signal, and not with `status`, where a
    library was just then executing a text.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os._exit(status))
    if status == 128 + signal.SIGINT:
        atexit._run_exitfuncs()
        os._exit(status)


def install() -> None:
    """Handle the stop signals of this process; call it in the main thread."""
    early.give_back()
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        if _requests.training or lookout.watches():
            return
        if number == signal.SIGINT and callable(before):
            before(number, frame)
        else:
            os._exit(128 + number)

    for number in STOP_SIGNALS:
        signal.signal(number, handle)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_read, args=[reader], name="signals", daemon=True).start()


def _read(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if number in STOP_SIGNALS:
                _requests.receive(number)


def training_begins(say: Callable[[str], None], finish: Callable[[], None]) -> None:
    """From here on a signal has the run save and end.

    Args:
        say: prints a line to the user.
        finish: waits for what is being written; called if another process has failed.
    """
    _requests.say, _requests.finish = say, finish
    _requests.training = True


def all_have_begun() -> None:
    """Have the launcher pass signals on: `training_begins` was called on every process.

    Before that, a signal would end some processes while others take it as a request.
    """
    for left in (launcher.mark(launcher.STOPPED), launcher.mark(launcher.TOLD)):
        if left is not None and ranks.local_process_index() == 0:
            left.unlink(missing_ok=True)  # of processes that were stopped for a node to join, or failed
    if ranks.local_process_index() == 0:
        launcher.leave(launcher.TRAINING, str(os.getpid()))


def asked_to_stop() -> signal.Signals | None:
    """The signal that asked this process to stop, or None."""
    return None if _requests.first is None else signal.Signals(_requests.first)


def tell_stopped() -> None:
    """The run has stopped and saved: the launcher, or this process without one, tells by its status."""
    _requests.stopped = True
    if ranks.local_process_index() == 0:
        launcher.leave(launcher.STOPPED)


def status_of_stopped() -> int:
    """The status for a process that has met no error: an agent would restart others than 0."""
    by_itself = launcher.VARIABLE not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return EXIT_STOPPED if _requests.stopped and by_itself else 0


def tell_launcher(text: str) -> None:
    """Have the launcher print `text`, how to resume, if the processes end with an error."""
    if ranks.local_process_index() == 0:
        launcher.leave(launcher.GO_ON, text)
