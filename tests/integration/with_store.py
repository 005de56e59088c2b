"""``python -m tests.integration.with_store VERB ...``: the command line, with `FolderStore` as S3."""

from __future__ import annotations

import os
import sys

sys.argv[0] = "falcon-qlora"  # by which the package knows its command, and handles signals from here on

from falcon_qlora import __main__ as command_line  # noqa: E402
from falcon_qlora.commands import train  # noqa: E402
from tests import folder_store  # noqa: E402

folder_store.register()
if sys.argv[1].startswith("-"):  # a worker, which gets flags alone
    from falcon_qlora.train import main
    from falcon_qlora.training import finish

    finish._END_SECONDS = finish._STOP_SECONDS = float(os.environ.get("PATIENCE", "60"))
    main()
else:
    standard = train.main
    train.main = lambda argv: standard(argv, worker_module="tests.integration.with_store")  # type: ignore[assignment]
    sys.exit(command_line.main(sys.argv[1:]))
