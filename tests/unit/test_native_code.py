"""Native code of others that panics, or works without end: it is ended, and what it worked on is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from falcon_qlora.common.errors import PanicError, UserError, native_work, panics_as_errors
from falcon_qlora.data.tokens import Encoder
from falcon_qlora.models import tokenizer
from falcon_qlora.models.locate import packaged_folder
from tests.integration.processes import Processes
from tests.integration.runs import write_jsonl
from tests.panics import PanicException

REPOSITORY = Path(__file__).resolve().parents[2]

# Hashing lets other threads run, and looks at no signal until it is done.
WAITS = """
import hashlib, time
from falcon_qlora.common.errors import panics_as_errors
from falcon_qlora.processes import stop_signals
stop_signals._LEAVE_SECONDS = 0.5
with stop_signals.stop_signals_raise(), panics_as_errors("reading x.json"):
    try:
        print("at work", flush=True)
        {work}
    except KeyboardInterrupt:
        time.sleep(1.5)
        print("tidied up", flush=True)
"""


@pytest.mark.parametrize(
    ("work", "status", "said"),
    [
        (
            "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
            130,
            ("", "error: native code does not heed SIGINT, reading x.json\n"),
        ),
        ("time.sleep(60)", 0, ("tidied up\n", "")),
    ],
)
def test_ctrl_c_ends_what_does_not_heed_it_and_nothing_else(
    work: str, status: int, said: tuple[str, str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(work=work)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The shell may have had pytest ignore it, as it does in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    try:
        assert process.communicate(timeout=30) == said
    finally:
        process.kill()
    assert process.returncode == status


LOSES = """
import os, signal, time, weakref
from falcon_qlora.processes.stop_signals import Ended, stop_signals_raise
def signalled(reference):
    os.kill(os.getpid(), signal.{number})
    for _ in range(100):
        pass
class Anything:
    pass
with stop_signals_raise():
    try:
        anything = Anything()
        reference = weakref.ref(anything, signalled)
        del anything
        time.sleep(20)
    except (KeyboardInterrupt, Ended):
        print("heeded")
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_whose_exception_python_drops_comes_again(number: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LOSES.format(number=number)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGTERM)],
    )
    assert (result.stdout, result.stderr) == ("heeded\n", "")


def panic(*arguments: object, **named: object) -> object:
    assert native_work()
    raise PanicException("index out of bounds")


def test_a_panic_names_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(eos_token_id=0, name_or_path="some/folder")
    stand_in = type("Panics", (), {**vars(stand_in), "__call__": panic})()
    encoder = Encoder(
        tokenizer=stand_in, train_on="all", append_end_token=False, overlong="split", max_length=8
    )
    with pytest.raises(PanicError, match=r"panicked, tokenizing with some/folder/tokenizer.json: index out"):
        encoder._tokenize(["x"])
    monkeypatch.setattr(tokenizer, "_class_for", lambda folder: SimpleNamespace(from_pretrained=panic))
    with pytest.raises(
        UserError,
        match=r"the tokenizer of tiny cannot be loaded: .* loading .*tiny/tokenizer.json: index out of",
    ):
        tokenizer.load_tokenizer("tiny")
    assert native_work() == []


# Trying each place of a long text takes a tenth of a second, which the library's own limit allows.
ENDLESS = {"type": "Split", "pattern": {"Regex": "(?:a|a){22}$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["data"], "loading"),
        (["generate"], "loading"),
        (["train", "--gpus", "1"], "tokenizing with"),  # by the launcher, as the rows are many
        (["train", "--gpus", "2"], "tokenizing with"),
    ],
)
def test_the_hang_watch_ends_it_while_rows_are_read(tmp_path: Path, words: list[str], where: str) -> None:
    write_endless_model(tmp_path, where)
    processes = Processes(tmp_path)
    more = [*words, "--hang_minutes", "0.05", "-m", "model"]
    more += ["--prompt", "a"] if words == ["generate"] else ["--dataset_name", "rows.jsonl"]
    (tmp_path / "temporary").mkdir()
    process = processes.start(
        "falcon_qlora",
        *more,
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        TMPDIR=str(tmp_path / "temporary"),
    )
    try:
        _, errors = process.communicate(timeout=120)
        assert processes.none_left()
    finally:
        processes.end()
    assert process.returncode == 1
    assert [*(tmp_path / "temporary").iterdir()] == []
    errors = errors.removeprefix("loading libraries …\n")
    assert re.fullmatch(
        rf"error: native code has not returned for \d s, {where} \S*model/tokenizer.json: take .*\n", errors
    )


def write_endless_model(folder: Path, where: str, *, letters: int = 600_000) -> None:
    """A model whose tokenizer is not done soon, loading or tokenizing as `where` says, and rows for it."""
    model = packaged_folder("tiny")
    assert model is not None
    shutil.copytree(model, folder / "model")
    file = folder / "model/tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [ENDLESS, content["pre_tokenizer"]]}
    if where == "loading":
        content["normalizer"] = {"type": "Prepend", "prepend": "a" * 20_000 + "!"}
    file.write_text(json.dumps(content))
    write_jsonl(folder / "rows.jsonl", [{"text": "a" * letters + "!"}, {"text": "b" * letters}])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "letters", "said"),
    [
        ("1", 600_000, "native code does not heed SIGINT, "),  # in the launcher, as the rows are many
        ("1", 20_000, "ended by SIGINT on {host}; native code did not heed it, "),
        ("2", 20_000, "ended by SIGINT on {host}; native code did not heed it, "),
    ],
)
def test_ctrl_c_ends_a_training_in_it(tmp_path: Path, gpus: str, letters: int, said: str) -> None:
    write_endless_model(tmp_path, "tokenizing with", letters=letters)
    processes = Processes(tmp_path)
    words = ["train", "--gpus", gpus, "-m", "model", "--dataset_name", "rows.jsonl"]
    process = processes.start("falcon_qlora", *words, XDG_CACHE_HOME=str(tmp_path / "cache"))
    try:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("tokenizing"):
            assert process.poll() is None, process.communicate()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert processes.none_left()
    finally:
        processes.end()
    where = f"tokenizing with {tmp_path}/model/tokenizer.json"
    assert (process.returncode, errors) == (130, f"error: {said.format(host=socket.gethostname())}{where}\n")


STOPPED = """
import os, signal, subprocess, time
from falcon_qlora.common.errors import panics_as_errors
from falcon_qlora.processes.watchdog import end_native_code_after
end_native_code_after(0.02)
with panics_as_errors("reading x.json"):
    subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
"""


@pytest.mark.slow
def test_the_time_in_which_a_process_is_stopped_does_not_count() -> None:
    subprocess.run(
        [sys.executable, "-c", STOPPED], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True
    )


def test_other_errors_pass() -> None:
    with pytest.raises(KeyboardInterrupt), panics_as_errors("x"):
        raise KeyboardInterrupt
