"""``python -m tests.integration.with_store VERB ...``: the command line, with `FolderStore` as S3."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.argv[0] = "falcon-qlora"  # by which the package knows its command, and handles signals from here on

from falcon_qlora import __main__ as command_line  # noqa: E402
from falcon_qlora.commands import train  # noqa: E402
from tests import folder_store  # noqa: E402

folder_store.register()
if sys.argv[1].startswith("-"):  # a worker, which gets flags alone
    from falcon_qlora.train import main
    from falcon_qlora.training import finish
    from falcon_qlora.training.trainer import FalconTrainer

    finish._END_SECONDS = finish._STOP_SECONDS = float(os.environ.get("PATIENCE", "60"))
    standard_step = FalconTrainer.training_step

    def paced(self: FalconTrainer, *given: Any, **named: Any) -> Any:
        """With PACED a step begins once the checkpoints before it are uploaded, or an upload is held."""
        step, store = self.state.global_step, Path(os.environ["STORE"])
        manifest = store / f"objects/bucket/run/checkpoints/step-{step - step % 2}/manifest.json"
        while (
            "PACED" in os.environ and step > 1 and not manifest.exists() and not (store / "WAITING").exists()
        ):
            time.sleep(0.02)
        return standard_step(self, *given, **named)

    FalconTrainer.training_step = paced  # type: ignore[method-assign]
    standard_rest = finish.mirror_rest

    def late(*given: Any) -> None:
        """With LATE this process comes to its end so many seconds after the others."""
        time.sleep(float(os.environ.get("LATE", "0")))
        standard_rest(*given)

    finish.mirror_rest = late
    main()
else:
    standard = train.main
    train.main = lambda argv: standard(argv, worker_module="tests.integration.with_store")  # type: ignore[assignment]
    sys.exit(command_line.main(sys.argv[1:]))
