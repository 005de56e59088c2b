"""`falcon-qlora train`: check the flags and what they name, then run `falcon_qlora.train` once per GPU.

The flags are read before torch is imported and before any process starts, so a mistyped flag is reported at
once; so are the errors that `first_look` finds. Several processes are started through torchrun's API. A
single process needs no torchrun agent, and then nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from falcon_qlora import config
from falcon_qlora.commands import launch_flags, other_launchers
from falcon_qlora.common.errors import (
    EXIT_BEREFT,
    EXIT_BUG,
    EXIT_HANGING,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    UserError,
    printable,
)
from falcon_qlora.common.files import temporary_folder
from falcon_qlora.config import Configuration
from falcon_qlora.config.arguments import LaunchArguments
from falcon_qlora.processes import command_clock, launcher, scheduler
from falcon_qlora.processes.cores import usable_cores
from falcon_qlora.processes.early import STOP_SIGNALS
from falcon_qlora.processes.launcher import SAME_REQUEST_SECONDS
from falcon_qlora.processes.stop_signals import Ended, sent_again_if_dropped, stop_signals_to
from falcon_qlora.processes.watchdog import end_native_code_after
from falcon_qlora.terminal.library_logging import ENVIRONMENT
from falcon_qlora.terminal.output import drop_what_cannot_be_written, say_loading

# How long a terminated worker has to exit; torchrun's agent gives it as long.
_LEAVE_SECONDS = 30


def main(argv: list[str], *, worker_module: str = "falcon_qlora.train") -> int:
    """Train on every visible GPU, or with `--gpus N` processes.

    Args:
        argv: the words after the verb.
        worker_module: what each process runs; tests put a stand-in here.

    Returns:
        0; 75 if the run was asked to stop and has saved; 2 if a worker met an error that the user can fix; 1
        after a bug; 128 + the signal that ended it.
    """
    drop_what_cannot_be_written()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("falcon-qlora train starts torchrun itself; under torchrun run -m falcon_qlora.train")
    scheduler.refuse_others()
    given = config.read_flags(argv, verb="train", extra_arguments=LaunchArguments)
    given |= launch_flags.of_environment(given)
    configuration = config.configure(given, extra_arguments=LaunchArguments)
    launch: LaunchArguments = configuration.extra
    launch_flags.check(launch)
    end_native_code_after(configuration.run.hang_minutes)
    say_loading()
    processes = launch_flags.processes_of(launch.gpus)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    command = ["falcon-qlora", "train", *argv]
    with command_clock.told_to_workers(command), temporary_folder() as folder:
        launch_flags.keep_caches_in(folder)
        os.environ[launcher.VARIABLE] = str(folder)
        if not launch_flags.on_one_node(launch):
            # The workers' own store, anew at each start: the agents' can be lost with a node, and a node that
            # comes back waits there for what was never written.
            os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        os.environ[launcher.LAUNCHED] = launch_flags.launched(given, launch, processes)
        flags = config.as_words({name: value for name, value in given.items() if not hasattr(launch, name)})
        words = launcher.tied(worker_module, *flags)
        try:
            if processes == 1 and launch_flags.on_one_node(launch) and launch.max_restarts == 0:
                held = launcher.hold(folder / launcher.ROWS)
                status = _run_one(words, folder, lambda: _look_and_tokenize(configuration, held))
            else:
                one_node = launch_flags.on_one_node(launch)
                if one_node:  # elsewhere the ranks find what is wrong, and tell the other nodes
                    _look(configuration)
                agent = [*launch_flags.torchrun_flags(launch, processes), f"--log-dir={folder}", "--module"]
                status = _launch([*agent, *words], folder, on_one_node=one_node)
            return _of_dry_run(status) if configuration.run.dry_run else status
        finally:
            del os.environ[launcher.VARIABLE], os.environ[launcher.LAUNCHED]
            if (made := folder / launcher.DRY_RUN).exists():  # its process may have been killed
                shutil.rmtree(made.read_text(encoding="utf-8"), ignore_errors=True)


def _of_dry_run(status: int) -> int:
    """A dry run's exit status: one that a bug or a killed process ends has failed like any other."""
    return EXIT_USER_ERROR if status == EXIT_BUG else status


def _look(configuration: Configuration) -> None:
    from falcon_qlora.commands.first_look import look

    look(configuration)


def _look_and_tokenize(configuration: Configuration, held: IO[str]) -> None:
    """What the worker waits for before it reads rows, by the lock on `held`."""
    from falcon_qlora.commands.rows_ahead import tokenize_ahead

    try:
        _look(configuration)
        tokenize_ahead(configuration)
    finally:
        launcher.let_go(held)


class _WorkerEnded(BaseException):
    """The worker ended while this process did something for it."""


@contextlib.contextmanager
def _raised_at_the_end_of(worker: subprocess.Popen[bytes]) -> Iterator[None]:
    """Within the block, raise `_WorkerEnded` when the worker ends."""

    def ended(number: int, frame: Any) -> None:
        if worker.poll() is not None:
            raise _WorkerEnded

    earlier = signal.signal(signal.SIGCHLD, ended)
    try:
        with sent_again_if_dropped({_WorkerEnded: signal.SIGCHLD}):
            yield
    finally:
        signal.signal(signal.SIGCHLD, earlier)


class _StopOnce:
    """Passes the first signal on to the workers, which save and exit; the second kills everything at once.

    A signal within a moment of the first is part of the same request.

    Args:
        folder: where the workers leave a mark when there is something to save.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._asked_at: float | None = None
        self._asked_with: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        # The agent restarts failed workers; the new ones find the mark and exit.
        with contextlib.suppress(OSError):
            (self._folder / launcher.STOPPING).touch()
        workers = _children()
        self._asked_with = self._asked_with or number
        if self._asked_at is None and self._trains(workers):
            self._asked_at = time.monotonic()
            _send(workers, number)
            return
        if self._asked_at is not None:
            if time.monotonic() - self._asked_at <= SAME_REQUEST_SECONDS:
                return
            _send(workers, signal.SIGKILL)
        # An exception from a signal handler may get lost; then the agent sees that the workers have ended.
        _send(workers, signal.SIGTERM)
        raise Ended(signal.Signals(number))

    def _trains(self, workers: list[int]) -> bool:
        """Whether the workers have something to save: restarted workers that are still loading have not."""
        with contextlib.suppress(OSError, ValueError):
            return int((self._folder / launcher.TRAINING).read_text(encoding="utf-8")) in workers
        return False

    @property
    def was_asked(self) -> bool:
        return self._asked_with is not None

    def status(self, codes: Mapping[int, int]) -> int | None:
        """The exit status if the workers ended only because of the signal, with nothing to save; else None.

        Args:
            codes: rank → exit status of the workers that failed.
        """
        if self._asked_with is None:
            return None
        numbers = {self._asked_with, signal.SIGTERM}  # the agent ends the remaining workers with SIGTERM
        by_request = {128 + number for number in numbers} | {-number for number in numbers}
        if not by_request.issuperset(codes.values()):
            return None
        return _end(Ended(signal.Signals(self._asked_with)), self._folder)


def _children() -> list[int]:
    """The processes that this one has started; none if the system has no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            if int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.name))
    return found


def _send(processes: list[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _run_one(words: list[str], folder: Path, meanwhile: Callable[[], None]) -> int:
    """Run the only worker and turn how it ended into an exit status.

    Args:
        words: its module and that module's arguments.
        folder: where the launcher and the worker leave marks for each other.
        meanwhile: called while the worker loads libraries. What it raises ends the worker; it is broken off
            if the worker ends.
    """
    worker, ended, stop = None, None, _StopOnce(folder)
    with stop_signals_to(stop):
        try:
            # In a session of its own, so that only the launcher gets Ctrl-C, and passes it on.
            worker = subprocess.Popen([sys.executable, "-u", "-m", *words], start_new_session=True)
            with contextlib.suppress(_WorkerEnded), _raised_at_the_end_of(worker):
                meanwhile()
            code = worker.wait()
        except Ended as asked:
            ended = asked
            if worker is not None:
                worker.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired, Ended):
                    worker.wait(_LEAVE_SECONDS)
                worker.kill()
                worker.wait()
        except BaseException:
            if worker is not None:
                worker.kill()
                worker.wait()
            raise
    if ended is not None:
        return _end(ended, folder)
    if code == 0:
        return _done(folder)
    return stop.status({0: code}) or _status({0: code}, folder)


def _launch(torchrun_argv: list[str], folder: Path, *, on_one_node: bool) -> int:
    """Run torchrun's agent in this process and turn how it ended into an exit status."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", ENVIRONMENT["TORCH_CPP_LOG_LEVEL"])
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    launch_config, command, arguments = run.config_from_args(run.parse_args(torchrun_argv))
    if not on_one_node and not launch_config.max_restarts:
        threading.Thread(target=_end_late_agent, args=[folder], name="late agent", daemon=True).start()
    if not on_one_node:
        other_launchers.watch(launch_config, folder, lambda text: _leave_for_another(text, folder))
    # The agent reports every failure at length; the workers have already reported theirs.
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    stop = _StopOnce(folder)
    try:
        with stop_signals_to(stop):
            elastic_launch(config=launch_config, entrypoint=command)(*arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if not on_one_node and not stop.was_asked:
            rank, code = next(iter(codes.items()))
            other_launchers.tell(
                launch_config, folder, f"error: rank {rank} on {socket.gethostname()} {_how(code)}"
            )
        return stop.status(codes) or _status(codes, folder)
    except Ended as asked:
        return _end(asked, folder)
    except RendezvousError as error:
        return _apart(error, folder, launch_config.rdzv_endpoint)
    except SignalException as asked:  # one of _AGENT_SIGNALS
        return _end(Ended(asked.sigval), folder)
    finally:
        logging.disable(disabled)
    return _done(folder)


def _end_late_agent(folder: Path) -> None:
    """End this process where a worker has told of an error, but the agent waits for a node that is gone."""
    while not (folder / launcher.TOLD).exists():
        if not folder.exists():
            return
        time.sleep(1)
    time.sleep(_LEAVE_SECONDS)
    if folder.exists():
        _say_how_to_go_on(folder)
        _end_at_once(folder)


def _leave_for_another(text: str, folder: Path) -> None:
    """End this process, as a rank of another node has died and the ranks here wait for it."""
    if not (folder / launcher.TOLD).exists():
        print(printable(text), file=sys.stderr, flush=True)
    _end_at_once(folder)


def _end_at_once(folder: Path) -> None:
    _send(_children(), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(EXIT_BUG)


def _apart(error: Exception, folder: Path, endpoint: str) -> int:
    """The exit status where the agents of the nodes do not meet or have lost each other; told once."""
    if not (folder / launcher.TOLD).exists():
        why = type(error).__name__.removeprefix("Rendezvous").removesuffix("Error").lower()
        print(
            f"error: {socket.gethostname()}: the other nodes do not answer at {endpoint} ({why}): not "
            "started, ended, or cut off from the network",
            file=sys.stderr,
        )
    _say_how_to_go_on(folder)
    return EXIT_BUG


def _done(folder: Path) -> int:
    """The exit status where all workers of this node have ended with 0."""
    return EXIT_STOPPED if (folder / launcher.STOPPED).exists() else 0


def _end(asked: Ended, folder: Path) -> int:
    """The exit status of a launcher that a signal has ended; further signals are ignored."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    print(f"error: {asked}{_native_work(folder)}", file=sys.stderr)
    _say_how_to_go_on(folder)
    return 128 + asked.number


def _status(codes: Mapping[int, int], folder: Path) -> int:
    """One exit status for the failed workers, whose own are given by rank, in the order in which they ended.

    A worker that a signal has ended could not report this itself: it is done here, for the first one.
    """
    if EXIT_USER_ERROR in codes.values():
        return EXIT_USER_ERROR
    silent = [each for each in codes.items() if each[1] not in (EXIT_BUG, EXIT_HANGING, EXIT_BEREFT)]
    # When one has failed, the agent ends the others by this.
    by_agent = [each for each in silent if each[1] in (128 + signal.SIGTERM, -signal.SIGTERM)]
    silent = [each for each in silent if each not in by_agent]
    if EXIT_BUG not in codes.values():
        silent += by_agent
    if silent and EXIT_HANGING not in codes.values():
        rank, code = silent[0]
        how = f"{_how(code)}{_native_work(folder)}"
        print(f"error: rank {rank} on {socket.gethostname()} {how}", file=sys.stderr)
    _say_how_to_go_on(folder)
    return EXIT_BUG


def _how(code: int) -> str:
    """How a worker ended, from its exit status: it may have left by itself when a signal came."""
    number = -code if code < 0 else code - 128
    if number not in {*signal.Signals}:
        return f"ended with exit status {code}, without a message"
    hint = "; out of CPU memory?" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(number).name}{hint}"


def _native_work(folder: Path) -> str:
    """What a worker was at that could not heed a signal, for the message that it was ended."""
    try:
        return f"; native code did not heed it, {printable((folder / launcher.NATIVE).read_text('utf-8'))}"
    except OSError:
        return ""


def _say_how_to_go_on(folder: Path) -> None:
    """Print what the workers left to be said if they end by an error: how to resume."""
    go_on = folder / launcher.GO_ON
    if go_on.exists():
        print(printable(go_on.read_text(encoding="utf-8")), file=sys.stderr)
