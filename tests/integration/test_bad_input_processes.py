"""Bad input where several processes meet it, and what a signal leaves: one message, no process, no folder."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.integration.processes import Processes
from tests.integration.refusals import folder, is_no_more_than_phases, only_message, train

__all__ = ["folder"]  # a fixture


@pytest.fixture
def processes(folder: Path) -> Iterator[Processes]:
    result = Processes(folder)
    yield result
    result.end()


# Loading fails on the second process alone, as where another program fills its GPU.
ONE_FAILS = """
from falcon_qlora.processes import ranks
from falcon_qlora.training import build
from falcon_qlora.common.errors import UserError
from falcon_qlora.train import main
load = build.model_with_adapter
def fail(*arguments, **settings):
    if ranks.process_index() == 1:
        raise UserError("its GPU is full")
    return load(*arguments, **settings)
build.model_with_adapter = fail
main()
"""
LAUNCH = (
    "import sys; from falcon_qlora import __main__ as cli; from falcon_qlora.commands import train\n"
    "standard = train.main; train.main = lambda argv: standard(argv, worker_module='one_fails')\n"
    "sys.exit(cli.main(sys.argv[1:]))\n"
)


class TestSeveralProcesses:
    def test_one_message_and_nothing_left(self, processes: Processes) -> None:
        (processes.folder / "bad.jsonl").write_text("{")
        words = train("--gpus", "2", "--dataset_name", "bad.jsonl", "--output_dir", "out")
        status, output, errors = processes.run("falcon_qlora", *words)
        assert (status, is_no_more_than_phases(output)) == (2, True)
        assert only_message(errors).startswith("bad.jsonl:1: not valid JSON")

    def test_that_one_of_them_meets(self, processes: Processes) -> None:
        (processes.folder / "one_fails.py").write_text(ONE_FAILS)
        (processes.folder / "launch.py").write_text(LAUNCH)
        status, output, errors = processes.run(
            "launch", *train("--gpus", "2"), PYTHONPATH=".", PYTHONDONTWRITEBYTECODE="1"
        )
        assert (status, is_no_more_than_phases(output)) == (2, True), errors
        assert only_message(errors) == "its GPU is full"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--quantise_mode", "4bit"], "unknown flag --quantise_mode"),
            (["--sharding", "fsdp", "--offload_base"], "both say where the base lies"),
            (["--dataset_name", "row.jsonl"], "file not found: row.jsonl"),
        ],
    )
    def test_under_plain_torchrun(self, processes: Processes, words: list[str], message: str) -> None:
        # Before the settings are read, before there is a process group, and after.
        torchrun = ["torch.distributed.run", "--nproc_per_node", "2", "-m", "falcon_qlora.train"]
        status, output, errors = processes.run(*torchrun, *train(*words)[1:])
        assert status != 0
        assert is_no_more_than_phases(output)
        (told,) = [line for line in errors.splitlines() if line.startswith("error:")]
        assert message in told
        # Torchrun says at length that it failed, and shows no traceback but its own.
        assert errors.count("Traceback") == 1
        assert "falcon_qlora/" not in errors.split(told)[1].replace("falcon_qlora.train", "")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [("-m", "tiiuae/falcon-7b"), ("--dataset_name", "tatsu-lab/alpaca")])
    def test_a_hub_that_refuses_connections(self, processes: Processes, name: tuple[str, str]) -> None:
        status, _, errors = processes.run(
            "falcon_qlora",
            *train(*name),
            HF_HUB_OFFLINE="0",
            HF_ENDPOINT="http://me:swordfish@127.0.0.1:9",
            HF_TOKEN="hf_marlin",
        )
        assert (status, "swordfish" in errors, "marlin" in errors) == (2, False, False)
        assert "the hub cannot be reached" in only_message(errors)
        assert ("falcon-qlora prepare" in errors) or name[0] != "-m"

    @pytest.mark.slow
    def test_a_rejected_key_of_weights_and_biases(self, processes: Processes) -> None:
        key = "0123456789" * 4
        with rejecting_server() as address:
            status, output, errors = processes.run(
                "falcon_qlora",
                *train("--gpus", "2", "--report_to", "wandb", "--output_dir", "out"),
                WANDB_MODE="online",
                WANDB_BASE_URL=address,
                WANDB_API_KEY=key,
            )
        assert (status, is_no_more_than_phases(output)) == (2, True)
        assert only_message(errors).startswith("W&B rejected the key")
        assert "WANDB_MODE=offline" in errors
        assert "--report_to none" in errors
        assert key not in errors


@contextlib.contextmanager
def rejecting_server() -> Iterator[str]:
    """An address whose every answer is 401, in the words of W&B's server."""

    class Reject(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b'{"errors": [{"message": "user is not logged in", "path": ["viewer"]}]}'
            self.send_response(401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Reject) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
