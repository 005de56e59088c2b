"""Every kernel compiles for the GPUs that are supported, without one, and fits into them."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from falcon_qlora.kernels import fp8_gelu
from tests.kernels.compile_ahead import FP8_CAPABILITY, FP8_MODULES, MODULES

# Bytes of shared memory that a program may have: A100, A10, L4 and RTX 40, H100 and H200, B200, RTX 50.
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
REGISTERS_A_PROGRAM = 65_536
# Releases of the compiler differ by a register or two; an array in memory would be far larger.
STACK_BYTES = 32
# On a B200, where a product goes through tensor memory, this gradient of Falcon-H1's has no more registers.
STACK_BYTES_OF = {(100, "ssd_triton._of_scores"): 256}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_and_fit(capability: int, repository: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(repository), *filter(None, sys.path)])
    script = repository / "tests" / "kernels" / "compile_ahead.py"
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert {one["kernel"] for one in compiled} == launched(capability)
    for one in compiled:
        assert one["shared_bytes"] <= SHARED_BYTES[capability], one
        threads = 32 * one["options"]["num_warps"]
        assert threads * one["registers"] <= REGISTERS_A_PROGRAM, one
        most = STACK_BYTES_OF.get((capability, one["kernel"]), STACK_BYTES)
        assert one["stack_bytes"] <= most, f"registers are kept in memory: {one}"
        stores_sums_alone = one["kernel"].startswith("scale_shift") and one["options"].get("NORM", False)
        # One value a head, or a row.
        stores_few = one["kernel"] == "ssd_triton._of_steps" or one["kernel"].startswith("fp8_bounds.")
        assert one["vector_stores"] > 0 or stores_sums_alone or stores_few, f"stores too short: {one}"


def launched(capability: int) -> set[str]:
    """The kernels that the modules launch, each as ``module.name``, read off their sources."""
    modules = MODULES + (FP8_MODULES if capability >= FP8_CAPABILITY else ())
    found = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name in re.findall(r"^\s+(_\w+)\[.*\]\(", inspect.getsource(module), re.MULTILINE)
    }
    elsewhere = capability // 10 not in fp8_gelu.WITH_REGISTERS
    return found - ({"fp8_gelu._gelu_backward_and_low_rank"} if elsewhere else set())
