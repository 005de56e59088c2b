"""Python processes that begin with the libraries loaded: forks of one that has imported them and no more.

    Popen([sys.executable, "-m", "falcon_qlora", "train", ...], env=..., ...)

is `subprocess.Popen` in all but where the ten seconds of importing go. What runs is the module as
``python -m`` runs it, in a process of its own with its own words, environment, folder, session and streams;
so are the workers that the launcher starts. Where a process needs what is read while libraries load (another
`HF_HOME`, say), a GPU is there, or ``FORKS=0`` is in the environment of the tests, it is started as ever.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import importlib
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# In the environment: a process whose namespaces the fork enters, so that it runs as on another machine.
NAMESPACES = "TESTS_NAMESPACES_OF"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# What libraries, or Python, read once, as they are loaded. Where one of these differs there is no fork.
_READ_EARLY = ("HF_", "TRITON", "CUDA", "LC_", "LANG", "PYTHONIOENCODING", "PYTHONUTF8", "ACCELERATE", "BNB_")
_READ_LATE = ("HF_HUB_VERBOSITY", "HF_HUB_DISABLE_TELEMETRY", "CUDA_VISIBLE_DEVICES")
_LIBRARIES = (
    *("falcon_qlora.training.run", "falcon_qlora.training.build", "falcon_qlora.training.finish"),
    *("falcon_qlora.training.trainer", "falcon_qlora.training.preflight", "falcon_qlora.commands.compare"),
    *("falcon_qlora.commands.train", "falcon_qlora.commands.merge", "falcon_qlora.commands.generate"),
    *("falcon_qlora.commands.eval", "falcon_qlora.commands.bench"),
    *("falcon_qlora.data.corpus", "falcon_qlora.data.stream", "falcon_qlora.models.load"),
    *(
        "torch.distributed.run",
        "torch.distributed.launcher.api",
        "torch.distributed.elastic.agent.server.api",
    ),
    *("transformers.models.falcon.modeling_falcon", "transformers.models.llama.modeling_llama"),
    *("transformers.integrations", "transformers.trainer", "peft", "trl.trainer.sft_trainer", "bitsandbytes"),
    *("datasets", "accelerate", "matplotlib.backends.backend_agg", "matplotlib.figure", "torch._dynamo"),
    # What a run imports on its way.
    *("falcon_qlora.data.jinja_template", "falcon_qlora.inference.sample_answers", "peft.tuners.lora.bnb"),
    *("falcon_qlora.training.activations", "falcon_qlora.training.progress", "falcon_qlora.training.alike"),
    *("transformers.models.falcon_h1.modeling_falcon_h1", "torch.utils.serialization", "PIL.JpegImagePlugin"),
)


_ANEW = subprocess.Popen  # also where a test has put ours in its place


class Popen(subprocess.Popen[Any]):
    """As `subprocess.Popen`, for words that begin with ``sys.executable, "-m"``, perhaps with ``-u``."""

    def _execute_child(self, args: Any, executable: Any, *more: Any) -> None:
        cwd, env, start_new_session = more[3], more[4], more[19]
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = more[8:14]
        words = [os.fspath(word) for word in args]
        environment = {str(name): str(value) for name, value in (os.environ if env is None else env).items()}
        if not _is_module(words) or not can_fork(environment):
            return super()._execute_child(args, executable, *more)  # type: ignore[misc]
        request = {
            "words": words[words.index("-m") + 1 :],
            "environment": environment,
            "folder": os.path.abspath(cwd or os.getcwd()),
            "session": bool(start_new_session),
        }
        streams = [given if given != -1 else own for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        if _server is None:
            # A launcher that is itself such a fork. No signal finds its handlers in what it starts.
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            self.pid = os.fork()
            if self.pid == 0:
                _become(request, streams)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        else:
            self.pid = _server.start(request, streams)
        self._child_created = True
        pipes = {
            theirs
            for ours, theirs in ((p2cwrite, p2cread), (c2pread, c2pwrite), (errread, errwrite))
            if ours != -1
        }
        for descriptor in pipes:
            os.close(descriptor)
        return None


def _is_module(words: list[str]) -> bool:
    return words[0] == sys.executable and "-m" in words[1:3]


def can_fork(environment: dict[str, str]) -> bool:
    """Whether a process with this environment can be a fork."""
    # What has asked the CUDA driver anything, as a launcher does, can have no fork that computes on a GPU.
    if (
        not sys.platform.startswith("linux")
        or os.environ.get("FORKS") == "0"
        or Path("/dev/nvidiactl").exists()
    ):
        return False
    _start.update({} if _start else os.environ)
    return all(
        environment.get(name) == _start.get(name)
        for name in {*environment, *_start}
        if name.startswith(_READ_EARLY) and name not in _READ_LATE
    )


class _Server:
    """The process that has imported everything, seen from the tests."""

    def __init__(self) -> None:
        # What it starts becomes a child of this process, which can wait for it.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._process = _ANEW(
            [sys.executable, "-m", "tests.integration.forks", str(theirs.fileno()), str(os.getpid())],
            cwd=Path(__file__).resolve().parents[2],
            env={
                "TORCH_CPP_LOG_LEVEL": "ERROR",
                **_start,
            },  # as `library_logging`, which is too late in a fork
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        atexit.register(self._end, os.getpid())

    def start(self, request: dict[str, Any], streams: list[int]) -> int:
        text = json.dumps(request).encode()
        self._socket.sendmsg(
            [len(text).to_bytes(8, "little")],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))],
        )
        self._socket.sendall(text)
        answer = self._socket.recv(8, socket.MSG_WAITALL)
        if len(answer) < 8:
            raise OSError("the process that imports the libraries for the tests has ended")
        return int.from_bytes(answer, "little")

    def _end(self, owner: int) -> None:
        if os.getpid() == owner:
            self._socket.close()
            self._process.wait()


class _LazyServer:
    """Started with the first process that is wanted."""

    def __init__(self) -> None:
        self._server: _Server | None = None

    def start(self, request: dict[str, Any], streams: list[int]) -> int:
        self._server = self._server or _Server()
        return self._server.start(request, streams)


_server: _LazyServer | None = _LazyServer()
# As it was when the first process was wanted.
_start: dict[str, str] = {}


def _serve(descriptor: int, parent: int) -> None:
    """Fork for every request, until the tests are gone."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    from transformers import conversion_mapping

    for name in _LIBRARIES:
        importlib.import_module(name)
    conversion_mapping.get_checkpoint_conversion_mapping("falcon")  # made once in a process, in 0.1 s
    connection = socket.socket(fileno=descriptor)
    while True:
        head, rights, *_ = connection.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
        if not head:
            os._exit(0)
        streams = array.array("i")
        for _, _, data in rights:
            streams.frombytes(data)
        text = connection.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL)
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            # What it forks is an orphan once it has ended, and so a child of the tests' process.
            child = os.fork()
            if child:
                os.write(writer, child.to_bytes(8, "little"))
                os._exit(0)
            while os.getppid() != parent:
                pass
            connection.close()
            os.close(reader)
            os.close(writer)
            _become(json.loads(text), list(streams))
        os.waitpid(between, 0)
        connection.sendall(os.read(reader, 8))
        for each in (reader, writer, *streams):
            os.close(each)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Be the process that was asked for: run its module to its end. Does not return."""
    global _server
    status = 1
    try:
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, 0)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        signal.set_wakeup_fd(-1)
        if (place := request["environment"].pop(NAMESPACES, None)) is not None:
            for kind in ("user", "net", "uts", "mnt"):
                if libc.setns(os.open(f"/proc/{place}/ns/{kind}", os.O_RDONLY), 0):
                    raise OSError(f"no entry to the {kind} namespace of process {place}")
        if request["session"]:
            os.setsid()
        kept = [os.dup(each) for each in streams]
        for own, each in enumerate(kept):
            os.dup2(each, own)
        for each in {*kept, *streams} - {0, 1, 2}:
            with contextlib.suppress(OSError):
                os.close(each)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        _server = None
        _start.update(os.environ)
        # What a launcher is about, which is not its worker's.
        tempfile.tempdir = None
        logging.disable(logging.NOTSET)
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]
        subprocess.Popen = Popen  # type: ignore[misc]
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
        from torch.distributed.elastic.rendezvous import dynamic_rendezvous

        subprocess_handler.Popen = Popen  # type: ignore[attr-defined]
        # For its log the agent asks again and again who called, which looks through all that is imported.
        dynamic_rendezvous.get_method_name = lambda depth=2: ""
        _open_streams()
        _look_in([request["folder"], *request["environment"].get("PYTHONPATH", "").split(os.pathsep)])
        module, *words = request["words"]
        sys.argv = [module, *words]
        status = _run(module)
    except KeyboardInterrupt:
        status = 130  # a signal that came before there is anything to tell it to
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def _run(module: str) -> int:
    """The exit status that Python itself would give."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 255
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if module != "falcon_qlora.commands.worker":  # whose main function takes it: it has not begun
            traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _open_streams() -> None:
    """Python's own streams anew, as their kind and encoding depend on what they are."""
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(  # type: ignore[misc]
        2, "w", closefd=False, buffering=1, errors="backslashreplace"
    )


def _look_in(folders: Iterable[str]) -> None:
    sys.path[:] = [*dict.fromkeys(each for each in folders if each), *sys.path]


if __name__ == "__main__":
    # Under the name that what is forked knows it by.
    from tests.integration import forks

    forks._serve(int(sys.argv[1]), int(sys.argv[2]))
