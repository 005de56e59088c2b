"""The launcher tokenizes the rows of large files while its worker loads libraries."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from falcon_qlora.commands import train as launcher
from falcon_qlora.processes import launcher as marks
from tests.integration.runs import command

ROW = {"instruction": "Say it. " + "word " * 60, "output": "said"}
ENOUGH = 4000  # rows of more than 1 MB
TRAIN = "train -m tiny --max_length 128 --steps 1 -b 1 --lora_r 2 --report_to none --save_strategy no".split()


def write(file: Path, rows: int, *more: str) -> Path:
    file.write_text("\n".join([*[json.dumps(ROW | {"number": n}) for n in range(rows)], *more]))
    return file


@pytest.mark.parametrize(("rows", "cached"), [(ENOUGH, 1), (100, 0)])
def test_the_worker_finds_the_rows_of_a_large_file_in_the_cache(
    tmp_path: Path, rows: int, cached: int
) -> None:
    file, cache = write(tmp_path / "rows.jsonl", rows), tmp_path / "cache"
    cache.mkdir()
    (tmp_path / "looks.py").write_text(
        "import os\n"
        "from falcon_qlora.processes import launcher\n"
        "launcher.wait_for(launcher.ROWS)\n"
        f"print('found', len(os.listdir({str(cache)!r})))\n"
    )
    words = [*TRAIN, "--dataset_name", str(file), "--cache_dir", str(cache), "--gpus", "1"]
    code = (
        "import sys\n"
        "from falcon_qlora.commands.train import main\n"
        "status = main(sys.argv[2:], worker_module='looks')\n"
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{Path(launcher.__file__).parents[2]}:{tmp_path}"},
    )
    assert f"found {cached}" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "0 False"


@pytest.mark.slow
def test_an_error_in_a_late_row_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ENOUGH, '{"instruction": "Say it.", "output":')
    done = command(*TRAIN, "--dataset_name", file, "--cache_dir", tmp_path, "--output_dir", tmp_path / "run")
    assert done.returncode == 2
    assert f"{file}:{ENOUGH + 1}: not valid JSON" in done.stderr
    assert done.stderr.count("error:") == 1
    assert "loading the base model" not in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("code", "status"), [(0, 0), (1, 1), (2, 2)])
def test_work_for_a_worker_that_ends_is_broken_off(tmp_path: Path, code: int, status: int) -> None:
    (tmp_path / "ends.py").write_text(f"import time; time.sleep(0.3); raise SystemExit({code})")
    run = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from falcon_qlora.commands import train
        print(train._run_one(["ends"], Path("."), meanwhile=lambda: time.sleep(60)))
        """
    )
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", run],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{Path(launcher.__file__).parents[2]}:{tmp_path}"},
    )
    assert done.stdout.splitlines()[-1:] == [str(status)], done.stderr
    assert time.monotonic() - begun < 20


def test_a_worker_that_ends_where_python_drops_errors_breaks_off_the_work(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import time; time.sleep(0.3)")
    run = """
        import time, weakref
        from pathlib import Path
        from falcon_qlora.commands import train
        class Anything:
            pass
        def work():
            anything = Anything()
            reference = weakref.ref(anything, lambda _: time.sleep(10))
            del anything
            time.sleep(60)
        print(train._run_one(["ends"], Path("."), meanwhile=work))
    """
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(run)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{Path(launcher.__file__).parents[2]}:{tmp_path}"},
    )
    assert (done.stdout.splitlines()[-1:], done.stderr) == (["0"], "")
    assert time.monotonic() - begun < 20


def test_a_worker_waits_for_the_launcher_however_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(marks.VARIABLE, str(tmp_path))
    marks.wait_for(marks.ROWS)  # without a launcher that holds it
    hold = f"""
        import sys, time
        from pathlib import Path
        from falcon_qlora.processes import launcher
        held = launcher.hold(Path({str(tmp_path)!r}) / launcher.ROWS)
        print("held", flush=True)
        time.sleep(60)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(hold)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waits = "from falcon_qlora.processes import launcher; launcher.wait_for(launcher.ROWS); print('on')"
    waiter = subprocess.Popen([sys.executable, "-c", waits], stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        waiter.wait(1.5)
    holder.kill()
    assert waiter.communicate(timeout=20)[0] == "on\n"
    holder.communicate()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_where_nothing_can_be_locked_a_worker_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(handle: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setenv(marks.VARIABLE, str(tmp_path))
    held = marks.hold(tmp_path / marks.ROWS)
    marks.wait_for(marks.ROWS)
    marks.let_go(held)
    assert held.closed
