"""Checkpoints changed at random: `--resume` goes on as if nothing were, or refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

import falcon_qlora
from falcon_qlora.checkpoint.verify import describe_file
from tests.fuzzing import change, fresh_copy, fuzz, read_or_refused
from tests.integration.conftest import STEP


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / f"step-{STEP}"


def with_true_manifest(checkpoint: Path) -> None:
    """Let the manifest say what lies there now."""
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in manifest["files"]:
        path = checkpoint / name
        if path.is_file() and path.stat().st_size < 2**28:
            manifest["files"][name] = describe_file(path)
    file.write_text(json.dumps(manifest))


class Resumed:
    """A trainer as `--resume` makes it for a run, which goes on from whatever lies in the checkpoint then."""

    def __init__(self, good: Path, scratch: Path):
        self.good, self.scratch = good, scratch


def go_on(run: Path) -> Any:
    return falcon_qlora.train(resume=run, max_steps=STEP + 1)


NAMES = "manifest.json trainer_state.json processes.pt optimizer.pt scheduler.pt stream.json.gz adapter_model.safetensors adapter_config.json falcon_qlora.json".split()


@fuzz(20)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_resume(written, tmp_path_factory, data, name):
    run = fresh_copy(written / "streamed", tmp_path_factory.getbasetemp() / "resume")
    change(data.draw, checkpoint_of(run) / name)
    if name != "manifest.json":
        with_true_manifest(checkpoint_of(run))
    read_or_refused(run, lambda: go_on(run))
