"""Fine-tune Falcon models: a base frozen in 4 or 8 bits, LoRA on top, one replica on every GPU."""

from __future__ import annotations

from falcon_qlora.processes import early

early.install()

import importlib  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from falcon_qlora.common import library_imports  # noqa: E402
from falcon_qlora.common.errors import told_in_one_line  # noqa: E402
from falcon_qlora.common.version import VERSION as __version__  # noqa: E402
from falcon_qlora.terminal.library_logging import quietly  # noqa: E402
from falcon_qlora.terminal.output import write_every_character  # noqa: E402

__all__ = ["__version__", "apply_fast_path", "load_adapter", "load_model", "train"]

library_imports.install()

if TYPE_CHECKING:
    from pathlib import Path

    from falcon_qlora.inference.answers import load_adapter
    from falcon_qlora.models.fast_path import apply_fast_path
    from falcon_qlora.models.load import load_model

_IMPORTED_FROM = {
    "apply_fast_path": "falcon_qlora.models.fast_path",
    "load_adapter": "falcon_qlora.inference.answers",
    "load_model": "falcon_qlora.models.load",
}


def train(**settings: Any) -> Path:
    """Fine-tune in this process, with the settings of ``falcon-qlora train`` as keyword arguments.

    ``train(model_name_or_path="tiny", dataset_name="rows.jsonl", max_steps=20)``. Under torchrun each
    process calls it; alone it trains on one device. In a notebook, a progress bar and a chart of the losses
    are updated in the cell's output. Warnings and logs of libraries are silenced meanwhile.

    Returns:
        The run directory.

    Raises:
        UserError: for what the user can fix.
    """
    from falcon_qlora.common import allocator

    allocator.use_expandable_segments()
    write_every_character()
    with told_in_one_line(), quietly():
        from falcon_qlora.config import configure
        from falcon_qlora.training.run import train as train_configured

        given = {name: value for name, value in settings.items() if value is not None}
        return train_configured(configure(given))


def __getattr__(name: str) -> Any:
    # Loaded when first used: importing the package for its command line stays fast.
    if name in _IMPORTED_FROM:
        with quietly():
            function = getattr(importlib.import_module(_IMPORTED_FROM[name]), name)
        return told_in_one_line()(quietly()(function))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
