"""Every command where the locale's or the terminal's encoding lacks what rows and file names hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.runs import ENVIRONMENT

FILE = "données.jsonl"
ROWS = [
    {"instruction": f"Größe {number}, 数据 → ✓?", "output": f"Antwört {number} 👩"} for number in range(12)
]
DATA = f"-m tiny --max_length 64 --dataset_name {FILE}"
COMMANDS = [
    f"data {DATA} --png ü.png",
    f"prepare {DATA}",
    f"train {DATA} -b 2 --steps 1 --eval_split 0.2 --generate_samples 1 --report_to none --output_dir run",
    "inspect run",
    "generate --adapter run --max_new_tokens 2 --prompt Größe",
    f"eval --adapter run --dataset_name {FILE}",
    "merge --adapter run --out merged",
    f"train {DATA} --quantise_mode ü",
]
IN_TURN = """
import json, sys
from falcon_qlora.__main__ import main
for command in sys.argv[1:]:
    print(f"status {main(command.split(' '))}", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "commands"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, COMMANDS),
        ({"PYTHONIOENCODING": "latin-1"}, COMMANDS[:1]),
        ({"PYTHONIOENCODING": "ascii"}, [*COMMANDS[:1], f"params -m {FILE}"]),
    ],
)
def test_no_command_ends_by_a_character(
    tmp_path: Path, environment: dict[str, str], commands: list[str]
) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    (tmp_path / FILE).write_text("\n".join(lines), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-c", IN_TURN, *commands],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment},
        capture_output=True,
        timeout=400,
    )
    output, errors = result.stdout.decode(errors="replace"), result.stderr.decode(errors="replace")
    expected = [f"status {2 if 'quantise' in each or 'params' in each else 0}" for each in commands]
    assert [line for line in output.splitlines() if line.startswith("status")] == expected, errors
    assert "Traceback" not in errors
