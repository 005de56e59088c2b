"""A kernel is compiled once for all numbers of tokens: packs end elsewhere in every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.test_compile_ahead import launched


def printed(repository: Path, script: str, *words: str, **variables: str) -> Any:
    environment = {**os.environ, "TRITON_INTERPRET": "0", **variables}
    environment["PYTHONPATH"] = os.pathsep.join([str(repository), *filter(None, sys.path)])
    command = [sys.executable, str(repository / "tests" / "kernels" / script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "among"),
    [
        ("falcon-7b", ["_layer_norm", "_gelu", "_gelu_backward", "_dequantize_rows", "_cross_entropy"]),
        ("falcon-h1", ["_rms_norm", "_rms_norm_backward", "_convolve_backward", "_of_shared"]),
    ],
)
def test_a_steps_kernels_are_compiled_before_any_is_launched(
    repository: Path, tmp_path: Path, layout: str, among: list[str]
) -> None:
    ready = printed(repository, "side_by_side.py", layout, TRITON_CACHE_DIR=str(tmp_path))
    assert ready.keys() >= set(among)


@pytest.mark.slow
def test_no_kernel_is_compiled_again_for_another_number_of_tokens(repository: Path) -> None:
    found = printed(repository, "specialize.py")
    assert set(found["kernels"]) == launched(90)
    assert found["again"] == []
