"""``python -m tests.integration.faulty_launch train ...``: the command line, its processes made to fail."""

from __future__ import annotations

import sys

sys.argv[0] = "falcon-qlora"  # by which the package knows its command, and handles signals from here on

from falcon_qlora import __main__ as command_line  # noqa: E402
from falcon_qlora.commands import train  # noqa: E402

standard = train.main
train.main = lambda argv: standard(argv, worker_module="tests.integration.faulty_worker")  # type: ignore[assignment]
sys.exit(command_line.main(sys.argv[1:]))
