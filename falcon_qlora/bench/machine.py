"""What the machine is, found out without a context on its GPUs: that would take the runs' memory."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from typing import Any

_COLLECT = (
    "import json; from falcon_qlora.run_folder.environment import collect_environment; "
    "print(json.dumps(collect_environment()))"
)


@functools.cache
def machine() -> dict[str, Any]:
    """What `collect_environment` finds, in a process of its own."""
    result = subprocess.run([sys.executable, "-c", _COLLECT], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def driver() -> str:
    """The GPUs' driver; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return result.stdout.partition("\n")[0].strip() if result.returncode == 0 else ""
