"""A kernel is compiled once for all numbers of tokens: packs end elsewhere in every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.test_compile_ahead import launched


@pytest.mark.slow
def test_no_kernel_is_compiled_again_for_another_number_of_tokens(repository: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(repository), *filter(None, sys.path)])
    script = repository / "tests" / "kernels" / "specialize.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["kernels"]) == launched(90)
    assert found["again"] == []
