"""The configuration that every command shares.

Flags win over `--config FILE`, which wins over `--recipe NAME`, which wins over the default recipe. Parsing
imports neither torch nor Transformers; the trainer's own settings are built when first asked for.
"""

from falcon_qlora.config.arguments import DataArguments, ModelArguments, RunArguments
from falcon_qlora.config.configuration import Configuration, configure, parse, read_flags, to_be_written
from falcon_qlora.config.parser import as_words

__all__ = [
    "Configuration",
    "DataArguments",
    "ModelArguments",
    "RunArguments",
    "as_words",
    "configure",
    "parse",
    "read_flags",
    "to_be_written",
]
