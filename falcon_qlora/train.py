"""The module that torchrun starts, once per GPU.

``torchrun --nnodes 1 --nproc_per_node 8 -m falcon_qlora.train -m tiiuae/falcon-40b -q 8bit``

Nothing imports this module: importing it would replace the package's function `train`.
"""

from __future__ import annotations

import gc
import os
import sys

from falcon_qlora.common import allocator, late_imports

allocator.use_expandable_segments()  # before torch is loaded
gc.disable()  # until the libraries are loaded: looking for garbage takes a fifth of that time
late_imports.put_off()

from falcon_qlora.common.errors import UserError  # noqa: E402
from falcon_qlora.config import parse  # noqa: E402
from falcon_qlora.processes import (  # noqa: E402
    devices,
    endings,
    launcher,
    lookout,
    meeting,
    ranks,
    scheduler,
    stop_signals,
    watchdog,
)
from falcon_qlora.terminal.library_logging import quiet_libraries  # noqa: E402
from falcon_qlora.terminal.output import drop_what_cannot_be_written, say_loading  # noqa: E402
from falcon_qlora.training.run import train  # noqa: E402


def main() -> None:
    drop_what_cannot_be_written()
    joined = endings.exit_status(scheduler.join)
    if joined:
        endings.leave(joined)
    devices.open_gpu()
    stop_signals.install()
    watchdog.record_collectives()
    quiet_libraries(progress_bars=ranks.is_main_process())
    if launcher.VARIABLE not in os.environ and ranks.is_main_process():
        say_loading()
    status = endings.exit_status(_train)
    endings.leave(status or stop_signals.status_of_stopped())


def _train() -> None:
    patience, fault, configuration = meeting.PATIENCE_SECONDS, None, None
    try:
        configuration = parse(sys.argv[1:])
        patience = 60 * configuration.run.meet_minutes
    except UserError as error:
        fault = error
    lookout.begin(patience)  # so that all nodes hear of a fault
    if configuration is None:
        assert fault is not None
        raise fault
    train(configuration)


if __name__ == "__main__":
    main()
