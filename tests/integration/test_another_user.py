"""A folder of another user, which may be read and not written: one message, and nothing is changed in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from falcon_qlora.common.files import CACHE
from tests.integration.refusals import contents, only_message
from tests.integration.runs import ENVIRONMENT, write_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]
# The libraries may lie where only root reads.
AS_ANOTHER = "setpriv --reuid 1234 --regid 1234 --clear-groups".split() + [
    f"--{kind}=+dac_read_search" for kind in ("inh-caps", "ambient-caps")
]
WHO = "a user who may become another"
ROWS = ["--dataset_name", "rows.jsonl", "--max_length", "64", "--report_to", "none"]


def can_become_another() -> bool:
    return shutil.which("setpriv") is not None and subprocess.run([*AS_ANOTHER, "true"]).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason=f"needs {WHO}")
def test_what_another_user_owns_is_not_written(tmp_path: Path) -> None:
    if not can_become_another():
        pytest.skip(f"needs {WHO}")
    theirs = tmp_path / "theirs"
    (theirs / "run/checkpoints/step-1").mkdir(parents=True)
    (theirs / "run/config.yaml").write_text("model_name_or_path: tiny\ndataset_name: [rows.jsonl]\n")
    write_jsonl(theirs / "rows.jsonl", [{"text": "a"}])
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    before = contents(tmp_path)
    # What is said of a home that cannot be written is another test's.
    caches = dict.fromkeys(("TRITON_CACHE_DIR", CACHE), str(tmp_path))
    for words, told in (
        (["train", "-m", "tiny", *ROWS, "--output_dir", "run", "--overwrite"], "--output_dir run: cannot"),
        (["train", "-m", "tiny", *ROWS, "--output_dir", "new"], "--output_dir new: cannot write there"),
        (["train", "--resume", "--output_dir", "run"], "--output_dir run: cannot write there (Perm"),
        (["prepare", "-m", "tiny", *ROWS[:4], "--cache_dir", "cache"], "the cache folder cache cannot be"),
    ):
        result = subprocess.run(
            [*AS_ANOTHER, sys.executable, "-m", "falcon_qlora", *words],
            cwd=theirs,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)} | caches,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2, (words, result.stderr)
        assert only_message(result.stderr).startswith(told)
        assert contents(tmp_path) == before
