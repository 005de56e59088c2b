"""A run by URL with s3fs and a server that speaks S3 and goes away during the uploads."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.forks import Popen
from tests.integration.interrupted import ROWS
from tests.integration.runs import ENVIRONMENT, write_jsonl

_MISSING = [name for name in ("s3fs", "moto", "flask") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(_MISSING), reason=f"pip install s3fs moto flask flask-cors: no {', '.join(_MISSING)}"
    ),
]
SETTINGS = (
    "train -m tiny -q 4bit --max_length 64 -b 2 --lora_r 8 --save_steps 2 --logging_steps 1 "
    "--learning_rate 1e-3 --report_to none --dataset_name rows.jsonl --resume auto --steps"
).split()


class Server:
    """An S3 server whose objects stay while it is away."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self._made = lambda port: ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        self._running = self._made(0)
        self._running.start()
        self.port = self._running.get_host_and_port()[1]
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "one",
            "AWS_SECRET_ACCESS_KEY": "two",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def stop(self) -> None:
        self._running.stop()
        self._running._server.server_close()  # refuses connections; before, they are taken and unheard

    def start(self) -> None:
        self._running = self._made(self.port)
        self._running.start()

    def objects(self) -> dict[str, bytes]:
        from moto.s3.models import s3_backends

        (backends,) = (each for account, each in s3_backends.items())
        keys = backends["aws"].buckets["bucket"].keys
        return {name.removeprefix("run/"): keys[name].value for name in keys}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem(endpoint_url=made.environment["AWS_ENDPOINT_URL"], skip_instance_cache=True).mkdir(
        "bucket"
    )
    yield made
    with contextlib.suppress(Exception):
        made.stop()


def start(folder: Path, name: str, *words: str) -> Any:
    """``falcon-qlora`` as on a machine that has nothing of the run."""
    write_jsonl(folder / "rows.jsonl", ROWS)
    paths = f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    return Popen(
        [sys.executable, "-m", "falcon_qlora", *words],
        env={**os.environ, **ENVIRONMENT, "XDG_CACHE_HOME": str(folder / name), "PYTHONPATH": paths},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: Any) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=120)
    return process.returncode, " ".join(output.split()), errors


def test_a_server_that_goes_away_during_an_upload_and_comes_back_loses_nothing(
    server: Server, tmp_path: Path
) -> None:
    words = [*SETTINGS, "200", "--output_dir", "s3://bucket/run"]
    process = start(tmp_path, "one", *words)
    deadline = time.monotonic() + 60
    while not any(name.startswith("checkpoints/") for name in server.objects()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.stop()
    assert any("s3://bucket/run: nothing could be uploaded since" in line for line in process.stdout)
    time.sleep(1)
    server.start()
    status, output, errors = ended(process)
    assert (status, errors) == (0, "")
    assert "s3://bucket/run answers again: nothing is missing there" in output
    (run,) = (tmp_path / "one/falcon_qlora/runs").iterdir()
    there = server.objects()
    assert {name.split("/")[1] for name in there if name.startswith("checkpoints/")} == {
        "step-198",
        "step-200",
    }
    assert all((run / name).read_bytes() == content for name, content in there.items())
    assert "summary.json" in there
    # Elsewhere it goes on.
    words[words.index("200")] = "204"
    other = start(tmp_path, "two", *words)
    status, output, errors = ended(other)
    assert (status, errors) == (0, "")
    assert "going on from step 200" in output
