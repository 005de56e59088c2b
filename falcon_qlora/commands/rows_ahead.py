"""Tokenize a run's rows while its worker loads libraries; it then finds them in the cache. Needs no torch."""

from __future__ import annotations

from falcon_qlora.common.errors import UserError
from falcon_qlora.config import Configuration
from falcon_qlora.data.settings import RowSettings
from falcon_qlora.data.sources import LocalSource
from falcon_qlora.training import rows

# Fewer are read and tokenized in less time than the libraries that do it take to load.
_LEAST_BYTES = 2**20


def tokenize_ahead(configuration: Configuration) -> None:
    """Fill the cache with the documents of local files, where that takes long.

    Raises:
        UserError: as the run would. Other errors are left to the run.
    """
    try:
        if _takes_long(configuration):
            _tokenize(configuration)
    except UserError:
        raise
    except Exception:
        return


def _tokenize(configuration: Configuration) -> None:
    from falcon_qlora.terminal.console import patience
    from falcon_qlora.terminal.library_logging import quiet_libraries

    quiet_libraries(progress_bars=True)
    tokenizer = rows.load_tokenizer(configuration.model, configuration.method)
    with patience() as doing:
        rows.corpora(configuration.data, tokenizer, seed=configuration.run.seed, progress=doing)


def _takes_long(configuration: Configuration) -> bool:
    if configuration.data.streaming:
        return False
    sources = RowSettings(**rows.row_settings(configuration.data)).sources()
    local = [source for source in sources if isinstance(source, LocalSource)]
    sizes = [file.stat().st_size for source in local for file in source.files]
    return len(local) == len(sources) and sum(sizes) >= _LEAST_BYTES
