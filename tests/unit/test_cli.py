"""The command line and the launcher, run as a user runs them; a stand-in is what they train."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from falcon_qlora import __main__ as cli
from falcon_qlora.commands import train
from falcon_qlora.config.verbs import VERBS
from falcon_qlora.processes.launcher import STOPPING, TRAINING
from falcon_qlora.terminal.console import console
from tests.panics import PanicException

REPOSITORY = Path(__file__).resolve().parents[2]

STAND_IN = """
import os, signal, sys, time
rank = int(os.environ.get("RANK", 0))
mode = sys.argv[sys.argv.index("--run_name") + 1]
names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
# One write a line: the ranks share the launcher's output.
sys.stdout.write(f"rank={rank} pid={os.getpid()} {[os.environ.get(n) for n in names]} {sys.argv[1:]}\\n")
sys.stdout.flush()
if mode == "patient":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if rank == int(os.environ.get("WORLD_SIZE", 1)) - 1:
    if mode == "user":
        sys.stderr.write("error: mend this\\n")
        sys.exit(2)
    if mode == "bug":
        raise RuntimeError("a bug")
    if mode.startswith("killed"):
        os.kill(os.getpid(), int(mode.removeprefix("killed")))
    if mode.startswith("left"):
        os._exit(int(mode.removeprefix("left")))
if mode != "fine":
    time.sleep(120)
"""

LAUNCH = """
import sys
from falcon_qlora import __main__ as cli
from falcon_qlora.commands import train
from falcon_qlora.config.verbs import VERBS
standard = train.main
train.main = lambda argv: standard(argv, worker_module="stand_in")
sys.argv[1:1] = ["train"]
status = cli.main()
assert ("torch" in sys.modules) == ("1" not in sys.argv), "one process needs no torch in its launcher"
sys.exit(status)
"""


LOADING = "loading libraries …"

# Runs commands one after another. Each ends at the first import that takes its time, with status 99.
WITHOUT_LIBRARIES = """
import contextlib, io, json, sys, time
class Stop:
    def find_spec(self, name, path=None, target=None):
        asked, names = sys._getframe(1), []
        while "importlib" in asked.f_code.co_filename:
            asked = asked.f_back
            names.append(asked.f_code.co_name)
        if name in ("torch", "transformers", "datasets", "matplotlib") and "find_spec" not in names:
            raise SystemExit(99)
sys.meta_path.insert(0, Stop())
from falcon_qlora.__main__ import main
found = {}
for words in sys.argv[1:]:
    told, begun = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            status = main(words.split())
        except SystemExit as ended:
            status = ended.code or 0
    found[words] = status, told.getvalue(), time.process_time() - begun
print(json.dumps(found))
"""
TOLD_AT_ONCE = {
    "train --foo": "unknown flag",
    "train --help": "",
    "compare --foo": "unknown flag",
    "bench --plot /": "this is a folder",
    "data -m tiny --png /": "this is a folder",
    "--help": "",
    "--version": "",
    "nonsense": "unknown command",
    "train -m tiny --dataset_name none.jsonl": "file not found: none.jsonl",
    "train -m tiny --dataset_name bad.jsonl": "bad.jsonl:701: not valid JSON",
    "train -m tiny --dataset_name good.jsonl bad.jsonl": "bad.jsonl:701: not valid JSON",
    "train -m tiny --dataset_name chats.jsonl": "chats.jsonl:3: column messages: expected a list",
    "train -m tiny --dataset_name good.jsonl --eval_split none.jsonl": "file not found: none.jsonl",
    "train -m tiny --dataset_name good.jsonl --eval_split bad.jsonl": "bad.jsonl:701: not valid",
    "train -m tiny --dataset_name good.jsonl --template none.jinja": "none.jinja is not there",
    "train -m tiny --dataset_name good.jsonl --adapter none": "--adapter none: there is no such folder",
    "train -m tiny --dataset_name good.jsonl --config none.yaml": "there is no file none.yaml",
    "train -m ./none --dataset_name good.jsonl": "There is no folder './none'",
    "train -m ./other --dataset_name good.jsonl": "this model is a Falcon-Mamba",
    "data -m tiny --dataset_name bad.jsonl": "bad.jsonl:701: not valid JSON",
    "prepare -m tiny --dataset_name bad.jsonl": "bad.jsonl:701: not valid JSON",
    "compare -m tiny --dataset_name bad.jsonl": "bad.jsonl:701: not valid JSON",
    "train -m tiny --dataset_name good.jsonl --adapter torn": "torn/adapter has no adapter_model.safetensors",
    "train -m tiny --dataset_name good.jsonl --output_dir runs/old": "holds a run already",
    "train -m tiny --dataset_name good.jsonl --output_dir good.jsonl": "good.jsonl: this is a file",
    "train -m tiny --dataset_name good.jsonl --resume none": "--resume: none: there is no such folder",
    "train -m tiny --dataset_name good.jsonl --lora_target_modules x": "the blocks have no linear 'x'",
    "train -m tiny --dataset_name good.jsonl --method adapter --adapter_first_block 9": "no block would have",
    "train -m random:falcon-8b --dataset_name good.jsonl": "no preset 'falcon-8b'",
    "compare -m tiny --dataset_name good.jsonl --output_dir good.jsonl": "good.jsonl: this is a file",
    "compare none": "none holds no run",
    "bench --models tiny --dataset_name none.jsonl": "file not found: none.jsonl",
    "bench --models tiny --gpus 1 --dataset_name none.jsonl": "file not found: none.jsonl",
    "bench --models ./other --gpus 1": "this model is a Falcon-Mamba",
    "params -m ./other": "this model is a Falcon-Mamba",
    "params --adapter torn": "torn/adapter has no adapter_model.safetensors",
    "params -m tiny --lora_target_modules x": "the blocks have no linear 'x'",
    "eval -m tiny --dataset_name none.jsonl": "file not found: none.jsonl",
    "eval -m tiny --eval_split none.jsonl": "file not found: none.jsonl",
    "eval --adapter torn --dataset_name good.jsonl": "torn/adapter has no adapter_model.safetensors",
    "generate -m ./other --prompt why": "this model is a Falcon-Mamba",
    "generate --adapter torn --prompt why": "torn/adapter has no adapter_model.safetensors",
    "generate -m tiny --tokenizer_name_or_path ./none --prompt why": "There is no folder './none'",
    "merge --adapter torn --out new": "torn/adapter has no adapter_model.safetensors",
    "merge --adapter runs/old --out other": "other: exists already and is not a merge; name another folder\n",
    "merge --adapter runs/old --out other --overwrite": "is not a merge; name another folder, as --overwrite",
    "merge --adapter runs/old --out new --max_shard_size 5": "--max_shard_size 5: expected a size",
    "merge --adapter runs/old --out new -m ./none": "There is no folder './none'",
    "merge --adapter runs/old --out new --eval_split none.jsonl": "--eval_split FILE names another",
    "inspect none": "none: there is no such folder",
    "inspect good.jsonl": "good.jsonl: this is a file",
    "merge runs/old --out new": "every setting is given by its flag, such as --adapter runs/old",
    "inspect runs": "runs: no run, checkpoint",
}
SAYS_SO_FIRST = [
    "data -m tiny --dataset_name good.jsonl",
    "prepare -m tiny --dataset_name good.jsonl",
    "generate -m tiny --prompt why",
    "eval -m tiny --dataset_name good.jsonl",
    "compare -m tiny --dataset_name good.jsonl",
    "bench --models tiny",
    "merge --adapter runs/old --out new",
    "inspect runs/old",
]


class Launcher:
    """Starts `falcon-qlora train` with the stand-in for its workers."""

    def __init__(self, folder: Path):
        (folder / "stand_in.py").write_text(STAND_IN)
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        path = os.pathsep.join([str(REPOSITORY), str(folder)])
        self.environment = os.environ | {
            "PYTHONPATH": path,
            "TMPDIR": str(self.temporary),
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *argv: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *argv],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *argv: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*argv, **environment)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    result = Launcher(tmp_path)
    yield result
    for process in result.started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_a_command_loads_libraries_is_told(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "falcon_qlora", "data", "-m", "tiny", "--dataset_name", "sample"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"{LOADING}\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (
        128 + number,
        f"error: ended by {number.name} on {socket.gethostname()}\n",
    )


SHUTS_DOWN_LATE = """
import atexit, sys, time
sys.argv = ["falcon-qlora", *sys.argv[1:]]
atexit.register(lambda: [time.sleep(0.1) for _ in range(300)])
atexit.register(print, "shuts down", flush=True)
from falcon_qlora.__main__ import main
sys.exit(main())
"""


# Loaded libraries take most of a second to shut down.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("word", "status"), [("--version", 0), ("nothing", 2)])
def test_a_signal_while_a_command_shuts_down_changes_no_status(
    number: signal.Signals, word: str, status: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SHUTS_DOWN_LATE, word],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if status else subprocess.STDOUT,
        text=True,
        # The shell may have had pytest ignore it, as it does in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    said = list(iter(process.stdout.readline, "shuts down\n"))
    assert len(said) == (status == 0)
    process.send_signal(number)
    rest, _ = process.communicate(timeout=20)
    assert (process.returncode, rest) == (status, "")


def worker_pids(output: str) -> list[int]:
    return [int(pid) for pid in re.findall(r"pid=(\d+)", output)]


def read_lines(process: subprocess.Popen[str], count: int) -> str:
    assert process.stdout is not None
    return "".join(process.stdout.readline() for _ in range(count))


def assert_gone(pids: list[int], within_s: float = 5.0) -> None:
    assert pids
    deadline = time.monotonic() + within_s
    remaining = pids
    while remaining and time.monotonic() < deadline:
        remaining = [pid for pid in remaining if is_running(pid)]
        time.sleep(0.05)
    assert not remaining, f"still there: {remaining}"


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


class TestLauncher:
    def test_every_process_gets_its_place_and_the_users_flags(self, launcher: Launcher) -> None:
        argv = ["--gpus", "2", "--run_name", "fine", "--nnodes=1", "-q", "8bit"]
        status, output, errors = launcher.run(*argv, OMP_NUM_THREADS="3")
        assert (status, errors) == (0, "")
        first, *lines = output.splitlines()
        lines.sort()
        assert first == LOADING
        flags = "['--run_name', 'fine', '--quantize_mode', '8bit']"
        assert re.fullmatch(rf"rank=0 pid=\d+ \['2', '0', '2', '3'\] {re.escape(flags)}", lines[0])
        assert re.fullmatch(rf"rank=1 pid=\d+ \['2', '1', '2', '3'\] {re.escape(flags)}", lines[1])
        assert_gone(worker_pids(output))
        assert list(launcher.temporary.iterdir()) == []

    def test_one_process_without_gpus_and_a_share_of_the_cores(self, launcher: Launcher) -> None:
        del launcher.environment["OMP_NUM_THREADS"]
        left = {"RANK": "1", "LOCAL_RANK": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": ""}  # by a scheduler
        status, output, errors = launcher.run("--gpus", "1", "--run_name", "fine", **left)
        assert (status, errors) == (0, "")
        assert f"[None, None, None, '{len(os.sched_getaffinity(0))}'] ['--run_name', 'fine']" in output

    @pytest.mark.parametrize("processes", ["1", "2"])
    def test_what_the_user_can_mend_is_status_2_and_one_message(
        self, launcher: Launcher, processes: str
    ) -> None:
        status, output, errors = launcher.run("--gpus", processes, "--run_name", "user")
        assert (status, errors) == (2, "error: mend this\n")
        assert_gone(worker_pids(output))
        assert list(launcher.temporary.iterdir()) == []

    @pytest.mark.parametrize("processes", ["1", "2"])
    def test_a_bug_is_status_1_and_the_workers_own_traceback(
        self, launcher: Launcher, processes: str
    ) -> None:
        status, output, errors = launcher.run("--gpus", processes, "--run_name", "bug")
        assert status == 1
        assert errors.startswith("Traceback")
        assert errors.endswith("RuntimeError: a bug\n")
        assert errors.count("Traceback") == 1
        assert "elastic" not in errors
        assert_gone(worker_pids(output))

    @pytest.mark.parametrize(
        ("processes", "mode", "how"),
        [
            (1, "killed9", "was killed by SIGKILL; out of CPU memory?"),
            (2, "killed9", "was killed by SIGKILL; out of CPU memory?"),
            (2, "killed15", "was killed by SIGTERM"),
            (2, "killed10", "was killed by SIGUSR1"),
            (2, "killed11", "was killed by SIGSEGV"),
            # A worker leaves so by itself where a signal comes before there is anything to save.
            (1, "left143", "was killed by SIGTERM"),
            (2, "left138", "was killed by SIGUSR1"),
            (2, "left7", "ended with exit status 7, without a message"),
        ],
    )
    def test_a_worker_that_ended_without_a_word_is_named(
        self, launcher: Launcher, processes: int, mode: str, how: str
    ) -> None:
        status, output, errors = launcher.run("--gpus", str(processes), "--run_name", mode)
        told = f"error: rank {processes - 1} on {socket.gethostname()} {how}\n"
        assert (status, errors) == (1, told)
        assert_gone(worker_pids(output))

    @pytest.mark.parametrize("processes", [1, 2])
    @pytest.mark.parametrize(
        ("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
    )
    def test_a_signal_stops_every_process(
        self, launcher: Launcher, number: int, expected: int, processes: int
    ) -> None:
        process = launcher.start("--gpus", str(processes), "--run_name", "wait")
        pids = worker_pids(read_lines(process, 1 + processes))
        assert len(pids) == processes
        # Where memory runs out these are killed, and the launcher can tell of it.
        own = int(Path("/proc/self/oom_score_adj").read_text())
        assert {int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in pids} == {min(1000, own + 100)}
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        told = f"error: ended by {signal.Signals(number).name} on {socket.gethostname()}\n"
        assert (process.returncode, errors) == (expected, told)
        assert_gone(pids)

    def test_what_a_killed_launcher_left_is_removed_by_the_next_and_a_living_ones_stays(
        self, launcher: Launcher
    ) -> None:
        killed, living = (launcher.start("--gpus", "1", "--run_name", "wait") for _ in range(2))
        for process in (killed, living):
            read_lines(process, 2)
        killed.kill()
        killed.wait()
        assert len(list(launcher.temporary.iterdir())) == 2
        assert launcher.run("--gpus", "1", "--run_name", "fine")[0] == 0
        assert len(list(launcher.temporary.iterdir())) == 1
        living.send_signal(signal.SIGTERM)
        living.wait()
        assert list(launcher.temporary.iterdir()) == []

    def test_a_hangup_ends_the_agent_and_is_told(self, launcher: Launcher) -> None:
        process = launcher.start("--gpus", "2", "--run_name", "wait")
        pids = worker_pids(read_lines(process, 3))
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (129, f"error: ended by SIGHUP on {socket.gethostname()}\n")
        assert_gone(pids)

    @pytest.mark.parametrize("processes", [1, 2])
    def test_an_insistent_ctrl_c_does_not_wait_for_workers_that_do_not_listen(
        self, launcher: Launcher, processes: int
    ) -> None:
        process = launcher.start("--gpus", str(processes), "--run_name", "patient")
        pids = worker_pids(read_lines(process, 1 + processes))
        for _ in range(3):
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=15)
        assert process.returncode == 130
        assert_gone(pids)

    def test_a_second_signal_ends_the_workers_unless_it_is_the_first_once_more(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent: list[tuple[int, int]] = []
        clock = iter([100.0, 100.01, 100.9, 101.1])
        monkeypatch.setattr(train, "_children", lambda: [7])
        monkeypatch.setattr(train, "_send", lambda pids, number: sent.append((*pids, number)))
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        (tmp_path / TRAINING).write_text("7")
        stop = train._StopOnce(tmp_path)
        for _ in range(3):
            stop(signal.SIGINT, None)
        assert sent == [(7, signal.SIGINT)]
        with pytest.raises(train.Ended):
            stop(signal.SIGTERM, None)
        assert sent[:2] == [(7, signal.SIGINT), (7, signal.SIGKILL)]

    def test_a_signal_at_a_restart_ends_the_workers_even_where_what_it_raises_is_lost(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent: list[tuple[int, int]] = []
        monkeypatch.setattr(train, "_children", lambda: [8])
        monkeypatch.setattr(train, "_send", lambda pids, number: sent.append((*pids, number)))
        (tmp_path / TRAINING).write_text("7")  # by one that is gone
        stop = train._StopOnce(tmp_path)
        with contextlib.suppress(BaseException):
            stop(signal.SIGINT, None)
        assert sent == [(8, signal.SIGTERM)]
        assert (tmp_path / STOPPING).exists()  # which workers that the agent starts once more find
        assert stop.status({0: 128 + signal.SIGTERM}) == 128 + signal.SIGINT

    @pytest.mark.parametrize("processes", [1, 2])
    def test_a_launcher_that_is_killed_takes_its_workers_with_it(
        self, launcher: Launcher, processes: int
    ) -> None:
        process = launcher.start("--gpus", str(processes), "--run_name", "patient")
        pids = worker_pids(read_lines(process, 1 + processes))
        process.kill()
        process.wait()
        assert_gone(pids)


class TestRefusedAtOnce:
    """Told before torch is imported and before a process starts."""

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["train", "--quantise_mode", "4bit"], "did you mean --quantize_mode?"),
            (["train", "--gpuss", "2"], "did you mean --gpus?"),
            (["train", "--gpus", "0"], "--gpus: 0 is too small"),
            (["train", "--gpus", "two"], "--gpus: 'two' is not a whole number"),
            (["train", "--nnodes", "2"], "--rdzv_endpoint"),
            (["train", "--nnodes", "x"], "neither a number of nodes nor MIN:MAX"),
            (["train", "--max_restarts", "-1"], "at least 0"),
            (["trian"], "did you mean train?"),
            (["-m", "tiny", "--output_dir", "a b"], "such as: falcon-qlora train, then the same flags"),
            (["eval", "-m", "tiny", "--results", "/"], "--results /: this is a folder; name a file"),
            (["eval", "-m", "tiny", "--results", "/dev/null"], "/dev/null: this is no file that can be repl"),
            (["eval", "-m", "tiny", "--results", "/proc/x/a"], "--results /proc/x/a: cannot write there (No"),
            (["data", "-m", "tiny", "--png", "/"], "--png /: this is a folder; name a file"),
            (["data", "-m", "tiny", "--png", "/proc/x/a"], "--png /proc/x/a: cannot write there (No such"),
            (["estimate", "--table", "--plot", "/"], "--plot /: this is a folder; name a file"),
            (["estimate", "--table", "--plot", "/proc/x/a"], "--plot /proc/x/a: cannot write there (No such"),
            (["bench", "--csv", "/"], "error: --csv /: this is a folder; name a file"),
        ],
    )
    def test_with_status_2_and_one_line(
        self, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(argv) == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1

    def test_a_picture_without_a_name_has_its_folder_looked_at_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").write_text("no folder")
        assert cli.main(["data", "-m", "tiny", "--dataset_name", "sample"]) == 2
        told = "error: --png runs/data/lengths.png: cannot write there (Not a directory); name another file\n"
        assert capsys.readouterr().err == told

    def test_under_torchrun(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        assert cli.main(["train"]) == 2
        assert "-m falcon_qlora.train" in capsys.readouterr().err

    @pytest.mark.parametrize("words", TOLD_AT_ONCE)
    def test_without_libraries(self, words: str, without_libraries: dict[str, Any]) -> None:
        status, told, seconds = without_libraries[words]
        assert status == (2 if TOLD_AT_ONCE[words] else 0), told
        assert TOLD_AT_ONCE[words] in told
        assert seconds < 1  # of the processor: others may be at work here

    @pytest.mark.parametrize("words", SAYS_SO_FIRST)
    def test_or_a_line_is_written_before_they_are_loaded(
        self, words: str, without_libraries: dict[str, Any]
    ) -> None:
        status, told, seconds = without_libraries[words]
        assert (status, told) == (99, f"{LOADING}\n")
        assert seconds < 1

    @pytest.mark.parametrize("words", ["params -m tiny", "data -m tiny --dataset_name good.jsonl"])
    def test_counting_and_showing_rows_take_neither_torch_nor_peft(self, words: str, rows: Path) -> None:
        code = (
            "import sys; from falcon_qlora.__main__ import main; status = main()\n"
            "print(status, [each for each in ('torch', 'peft', 'trl') if sys.modules.get(each)])"
        )
        done = run_in(rows, code, *words.split())
        assert done.stdout.endswith("0 []\n"), done.stderr


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows that are well, rows that are not, a model of another family, and runs."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [json.dumps({"instruction": f"question {number}", "output": "yes"}) for number in range(1200)]
    (folder / "good.jsonl").write_text("\n".join(lines))
    (folder / "bad.jsonl").write_text("\n".join([*lines[:700], lines[0][:-3], *lines[701:]]))
    chat = json.dumps({"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]})
    (folder / "chats.jsonl").write_text(f'{chat}\n{chat}\n{{"messages": "3"}}\n{chat}')
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "falcon_mamba"}')
    shutil.copytree(REPOSITORY / "tests" / "integration" / "old_run", folder, dirs_exist_ok=True)
    shutil.copytree(folder / "runs" / "old", folder / "torn")
    (folder / "torn" / "adapter" / "adapter_model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def without_libraries(rows: Path) -> dict[str, Any]:
    """Words → exit status, what was told, seconds, where no library may be loaded."""
    return json.loads(run_in(rows, WITHOUT_LIBRARIES, *TOLD_AT_ONCE, *SAYS_SO_FIRST).stdout)


def run_in(folder: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(folder)},
    )


class TestCommandLine:
    def test_help_names_every_verb(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--help"]) == 0
        output = capsys.readouterr().out
        assert all(verb in output for verb in VERBS)

    def test_help_with_a_verb_is_the_verbs(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["help", "merge"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith("falcon-qlora merge [flags]")

    def test_a_command_is_no_rank_of_another_job(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        console.cache_clear()
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert cli.main(["params", "-m", "tiny"]) == 0
        assert "Trained: " in capsys.readouterr().out
        console.cache_clear()

    def test_nothing_given_shows_the_help_and_is_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([]) == 2
        assert "COMMAND" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            ("--hub_token hf_SeCrEt0123", "name a command before the flags"),
            ("--hub_token=hf_SeCrEt0123 -m tiny", "such as: falcon-qlora train"),
            ("--dataset_name https://me:SeCrEt0123@host/rows.jsonl", "name a command before the flags"),
            ("hf_SeCrEt0123 --hub_token", "unknown command; there are train, data"),
            ("https://me:SeCrEt0123@host/model", "unknown command; there are"),
            ("SeCrEt0123456789abcdef0123456789abcdef01", "unknown command; there are"),
            ("trian --hub_token hf_SeCrEt0123", "unknown command trian (did you mean train?)"),
            ("wandb-SeCrEt0123", "unknown command; there are"),
        ],
    )
    def test_what_was_typed_without_a_command_is_not_repeated(
        self, words: str, told: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(words.split()) == 2
        shown = capsys.readouterr()
        assert told in shown.err
        assert "SeCrEt" not in shown.err + shown.out

    def test_every_verb_has_its_module(self) -> None:
        folder = Path(cli.__file__).with_name("commands")
        assert all((folder / f"{verb}.py").is_file() for verb in VERBS)

    @pytest.mark.parametrize(
        ("error", "status", "printed"),
        [
            (KeyboardInterrupt(), 130, "error: interrupted\n"),
            (ZeroDivisionError("a bug"), 1, "ZeroDivisionError: a bug"),
            (PanicException("no\nsuch token"), 1, "error: native code of a library panicked: no\n"),
            (ConnectionError("no file, no number"), 1, "Traceback"),
            (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), 1, "Traceback"),
            (
                PermissionError(errno.EACCES, "Permission denied", "/a/b"),
                1,
                "error: /a/b: Permission denied\n",
            ),
            (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device\n"),
            (
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
                1,
                "CUDA out of memory. Tried to allocate 2.00 GiB: a GPU's memory ran out where",
            ),
        ],
    )
    def test_exit_status(
        self,
        error: BaseException,
        status: int,
        printed: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(words: list[str], **named: bool) -> int:
            raise error

        monkeypatch.setattr(cli, "_run", fail)
        assert cli.main(["train"]) == status
        told = capsys.readouterr().err
        assert (told == printed) if printed.startswith("error: ") else (printed in told)
