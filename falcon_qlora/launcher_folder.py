"""What the launcher and its processes tell each other by files, in a folder that goes with the launcher.

Imports no torch: the processes read it before they set up what torch reads when it is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "FALCON_QLORA_LAUNCHER"
# There is something to save; the launcher was asked to stop; how to go on after an error.
TRAINING, STOPPING, GO_ON = "training", "stopping", "go_on"


def mark(name: str) -> Path | None:
    """Where this process, or the launcher that started it, has its mark; None without a launcher."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) / name if folder else None
