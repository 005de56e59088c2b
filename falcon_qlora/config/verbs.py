"""The commands: what each is for, which of the shared settings it uses, and examples that run anywhere.

Help pages show the settings that a command uses; for a flag that it does not use, a note says so. Recipes
and settings files may have any setting: they are written for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from falcon_qlora.common.settings import settings_of
from falcon_qlora.config.arguments import DataArguments, ModelArguments, our_settings
from falcon_qlora.config.trainer_arguments import TrainerArguments
from falcon_qlora.methods.table import method_settings


def _names(arguments: type) -> frozenset[str]:
    return frozenset(each.name for each in settings_of(arguments))


def _all() -> frozenset[str]:
    return frozenset(each.name for each in our_settings()) | _names(TrainerArguments)


_FILES = frozenset({"recipe", "config"})
_TOKENIZER = frozenset("model_name_or_path tokenizer_name_or_path model_revision".split())
_OPENED = _names(ModelArguments) | {"device", "offload_base"}
_START = frozenset({"adapter", "adapter_sha256"})
_ORDER = frozenset("packing padding train_sampling_strategy streaming".split())  # these change no document
_ROWS = _names(DataArguments) - _ORDER | {"hang_minutes"}
_OF_ROWS = _ROWS - {"dataset_name", "max_length", "hang_minutes"} | {"tokenizer_name_or_path"}
_QUANTIZING = frozenset("quantize_mode double_quantization compute_dtype device output_dir overwrite".split())
_NEW_TOKENS = frozenset({"method", "new_tokens"})
_LENGTH = frozenset("max_steps num_train_epochs streaming".split())
_BATCH = frozenset("per_device_train_batch_size gradient_accumulation_steps global_batch_size".split())
_PLACED = frozenset(
    "quantize_mode double_quantization compute_dtype bf16 fp16 kernels checkpointing gradient_checkpointing "
    "sharding offload_base optim batch_tokens".split()
)
# A bench of whole commands sets these itself, or they would make its figures another recipe's.
BENCH_SETS = frozenset(
    "recipe compute_dtype per_device_train_batch_size global_batch_size gradient_accumulation_steps "
    "batch_tokens packing padding num_train_epochs device dry_run output_dir resume overwrite report_to "
    "save_strategy lora_dropout".split()
)


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One command.

    Attributes:
        name: as typed.
        summary: what it is for, in a line.
        uses: returns the names of the shared settings that change what it does; methods add some of them.
        uses_with: a setting with which the command does something else, and what it uses then.
        only_with: settings, and those of `uses` that do nothing without one of these; the first is told.
        means: shared settings that mean something else here, or have another default: their line of help.
        refuses: shared settings that contradict what it does, and what to give instead.
        more: further lines of its help page.
        examples: what follows the name; they use the small packaged model and rows.
    """

    name: str
    summary: str
    uses: Callable[[], frozenset[str]] = frozenset
    uses_with: tuple[str, Callable[[], frozenset[str]]] | None = None
    only_with: tuple[tuple[str, ...], frozenset[str]] | None = None
    means: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    examples: tuple[str, ...]

    def unused(self, given: Mapping[str, Any], own: Iterable[str]) -> list[str]:
        """The given settings that change nothing in this command; its own settings all do something."""
        uses = self.uses()
        if self.uses_with is not None and _is_on(given, self.uses_with[0]):
            uses = self.uses_with[1]()
        return sorted(given.keys() - set(own) - (uses - self._idle(given)))

    def manner(self, given: Mapping[str, Any], unused: Iterable[str]) -> str:
        """Words for the manner of the command in which these settings are unused; empty if it has one."""
        if self.uses_with is not None and _is_on(given, self.uses_with[0]):
            return f" with --{self.uses_with[0]}"
        if self.only_with is not None and self._idle(given).intersection(unused):
            return f" without --{self.only_with[0][0]}"
        return ""

    def _idle(self, given: Mapping[str, Any]) -> frozenset[str]:
        """Those of `uses` that do nothing, as what they need is not given."""
        if self.only_with is None or any(_is_on(given, name) for name in self.only_with[0]):
            return frozenset()
        return self.only_with[1]


def _is_on(given: Mapping[str, Any], name: str) -> bool:
    """Whether a setting is given, and not as false or 0."""
    return given.get(name) not in (None, False)


_NOT_COMPARED = {
    "method": "give --methods",
    "adapter": "each method begins with a fresh one",
    "dry_run": "try one method at a time with train",
    "resume": "compare goes on by itself where it stopped: give the same --output_dir",
}
_ADAPTERS_OWN = {
    "model_name_or_path": (
        "Base model or a merge: a hub id, a folder (also at s3:// or gs://), or `tiny`; unset: the "
        "adapter's own."
    ),
    "quantize_mode": "Storage of the base weights; unset: as the adapter was trained.",
}
_RUNS_OWN = "Settings that are not given are those of the adapter's run, if it is there."
_MEASURED = _ADAPTERS_OWN | {
    "dataset_name": "Rows to measure on, as in train; unset: those that the run held out.",
    "per_device_train_batch_size": "Sequences of --max_length at a time.",
}
_SAMPLE = "-m tiny --dataset_name sample"

VERBS: Mapping[str, Verb] = {
    each.name: each
    for each in (
        Verb(
            name="train",
            summary="fine-tune a quantized Falcon on every GPU: LoRA, Adapter, Adapter v2; or all of one",
            uses=_all,
            examples=(
                f"{_SAMPLE} --steps 5 -b 1 --output_dir runs/first",
                f"{_SAMPLE} --steps 5 -b 1 --method adapter --eval_split 0.05",
            ),
        ),
        Verb(
            name="data",
            summary="show what the model will see: rendered rows, lengths, what is dropped",
            uses=lambda: _FILES | _TOKENIZER | _START | _ROWS | _ORDER | _NEW_TOKENS
            | _BATCH | {"seed", "max_steps"},
            uses_with=(
                "streaming",
                lambda: VERBS["data"].uses() - _BATCH - {"packing", "padding", "cache_dir"},
            ),
            only_with=(("streaming", "config", "recipe"), frozenset({"max_steps"})),
            examples=(f"{_SAMPLE} --show 1",),
        ),
        Verb(
            name="prepare",
            summary="download and tokenize ahead, so that training needs no network; or quantize a base",
            uses=lambda: _FILES | _TOKENIZER | _START | _ROWS | _NEW_TOKENS
            | {"seed", "streaming", "max_steps"} | _QUANTIZING,
            uses_with=("output_dir", lambda: _FILES | _TOKENIZER | _QUANTIZING | {"hang_minutes"}),
            only_with=(("output_dir",), _QUANTIZING),
            means={"output_dir": "Folder for the quantized base.", "overwrite": "Replace that folder."},
            more="With --output_dir it reads no rows, but writes the base there, quantized, for -m DIR.",
            examples=(_SAMPLE, "-m tiny -q 4bit --output_dir tiny-4bit"),
        ),
        Verb(
            name="params",
            summary="count the parameters of a model and a method, without loading anything",
            uses=lambda: _FILES | _START | method_settings().keys()
            | {"model_name_or_path", "model_revision", "method"},
            examples=("-m random:falcon-7b", "-m random:falcon-7b --method adapter_v2"),
        ),
        Verb(
            name="estimate",
            summary="say what a training would take: memory, whether a card holds it, tokens/s, hours",
            uses=lambda: _FILES | _TOKENIZER | _START | _ROWS - {"dataset_num_proc"} | _ORDER | _LENGTH
            | _BATCH | _PLACED | method_settings().keys() | {"method", "seed", "resume", "output_dir"},
            uses_with=(
                "table",
                lambda: _FILES | _BATCH | _PLACED | method_settings().keys()
                | set("model_name_or_path model_revision max_length packing method resume".split())
                | {"output_dir", "hang_minutes"},
            ),
            only_with=(("resume",), frozenset({"output_dir"})),
            more="It needs no GPU, no network and no weights; all figures are estimates.",
            examples=(f"{_SAMPLE} --gpu 3090", "-m random:falcon-7b --max_steps 100", "--table --gpu 24GiB"),
        ),
        Verb(
            name="generate",
            summary="answer a prompt with a base model and an adapter",
            uses=lambda: _FILES | _OPENED | {"template", "dataset_format", "seed", "hang_minutes"},
            only_with=(("temperature",), frozenset({"seed"})),
            means=_ADAPTERS_OWN,
            more="The prompt is written with the template of the training unless --template names another.",
            examples=('--adapter runs/first --prompt "What is a falcon?"', "-m tiny --prompt Once"),
        ),
        Verb(
            name="compare",
            summary="train by several methods in turn on the same rows and lay the results side by side",
            uses=lambda: _all() - _NOT_COMPARED.keys() - {"adapter_sha256"},
            refuses=_NOT_COMPARED,
            more="falcon-qlora compare runs/a runs/b lays runs side by side that are there already.",
            examples=(f"{_SAMPLE} --methods lora,adapter --steps 2 --global_batch_size 4",),
        ),
        Verb(
            name="bench",
            summary="measure variants of a training step against each other",
            uses=lambda: _FILES | _TOKENIZER | _ROWS
            | {"device", "max_steps", "seed", "lora_r", "lora_alpha", "method"},
            uses_with=("gpus", lambda: _all() - BENCH_SETS),
            only_with=(("dataset_name", "gpus", "config", "recipe"), _OF_ROWS),
            more="Here --steps are the timed ones (10), and --max_length is a document's tokens (512).",
            examples=("-m tiny --variants reference,ours --tokens 512 --steps 1 --warmup 1",),
        ),
        Verb(
            name="merge",
            summary="merge an adapter into its base model, with proof of what that did",
            uses=lambda: _FILES | _OPENED | _ROWS
            | {"seed", "per_device_train_batch_size", "overwrite", "push_to_hub"}
            | {"hub_model_id", "hub_private_repo", "hub_revision", "hub_token"},
            means=_MEASURED | {"overwrite": "Replace what --out holds."},
            more=_RUNS_OWN,
            examples=("--adapter runs/first --out merged",),
        ),
        Verb(
            name="inspect",
            summary="say what a run, checkpoint, adapter or merge is, and whether it is whole",
            examples=("runs/first",),
        ),
        Verb(
            name="eval",
            summary="perplexity and answer loss of a base model, an adapter or a merge",
            uses=lambda: _FILES | _OPENED | _ROWS | {"seed", "per_device_train_batch_size"},
            uses_with=(
                "tasks",
                lambda: _FILES | _OPENED | {"hang_minutes", "max_length", "per_device_train_batch_size"},
            ),
            means=_MEASURED,
            more=_RUNS_OWN,
            examples=("--adapter runs/first --dataset_name sample --most_tokens 4096",),
        ),
    )
}  # fmt: skip
