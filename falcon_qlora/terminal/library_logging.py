"""Keep the libraries' chatter off the terminal, which belongs to the run.

What a user has set in the environment stays as it is. This file imports nothing heavy: the launcher uses it.
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
    # Else the tokenizers warn at every fork, and a data loader's worker may hang.
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_SILENT": "true",
    # Its crash reports look up a host even where W&B itself is offline.
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
    """`quiet_libraries` for a block of another's program, whose own warnings and logs are then as before."""
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    with warnings.catch_warnings():
        quiet_libraries()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def quiet_libraries(*, progress_bars: bool = True) -> None:
    """Silence warnings and log lines of the libraries below; errors still appear.

    Call it before the libraries are imported: some speak while they are.

    Args:
        progress_bars: Keep the bars for downloads and for mapping data sets: True on the main process.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not progress_bars:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
    # DeepSpeed sets its logger's level as it is imported; Transformers does so wherever it is installed.
    logging.getLogger("DeepSpeed").addFilter(_is_an_error)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)


def _is_an_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
