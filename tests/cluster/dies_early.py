"""``python -m tests.cluster.dies_early train ...``: with DIES a rank dies before it has met others."""

from __future__ import annotations

import os
import signal
import sys

sys.argv[0] = "falcon-qlora"  # by which the package knows its command, and handles signals from here on

from falcon_qlora import __main__ as command_line  # noqa: E402
from falcon_qlora.commands import train  # noqa: E402

if sys.argv[1].startswith("-"):  # a worker, which gets flags alone
    if os.environ["DIES"]:
        os.kill(os.getpid(), signal.SIGKILL)
    from falcon_qlora.train import main

    main()
else:
    standard = train.main
    train.main = lambda argv: standard(argv, worker_module="tests.cluster.dies_early")  # type: ignore[assignment]
    sys.exit(command_line.main(sys.argv[1:]))
