"""``python -m tests.cluster.leaves_word``: a rank leaves word for the main process, as it does at a save."""

from __future__ import annotations

import os

from falcon_qlora.terminal.library_logging import ENVIRONMENT

os.environ.update(ENVIRONMENT)

import torch.distributed as dist

from falcon_qlora.processes import agreement, ranks

if ranks.is_main_process():
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)
    print("ready", flush=True)
agreement.leave_word("save", f"of rank {ranks.process_index()}")
if ranks.is_main_process():
    print(agreement.words_left("save", give_up=lambda: False), flush=True)
