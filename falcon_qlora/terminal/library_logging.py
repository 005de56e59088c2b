"""Keep the libraries' chatter off the terminal, which belongs to the run.

Environment variables that a user has set stay as they are. This file imports nothing heavy, as the launcher
uses it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

# Read by libraries when they are imported, so the launcher gives these to its workers.
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_DISTRIBUTED_DEBUG": "OFF",
    # Otherwise the tokenizers warn at every fork, and a data loader's worker may hang.
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_SILENT": "true",
    # W&B's crash reports look up a host even when W&B itself is offline.
    "WANDB_ERROR_REPORTING": "false",
}

_LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "filelock",
    "fsspec",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "peft",
    "torch",
    "transformers",
    "trl",
    "urllib3",
    "wandb",
)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """`quiet_libraries` within a block; the settings of warnings and loggers are restored after it."""
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    with warnings.catch_warnings():
        quiet_libraries()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def quiet_libraries(*, progress_bars: bool = True) -> None:
    """Silence warnings and log lines of the libraries above; errors still appear.

    Call it before the libraries are imported: some print while they are.

    Args:
        progress_bars: keep the bars for downloads and for mapping datasets: True on the main process.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not progress_bars:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
    # DeepSpeed sets its logger's level when imported, and Transformers imports it wherever it is installed.
    logging.getLogger("DeepSpeed").addFilter(_is_an_error)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)


def _is_an_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
