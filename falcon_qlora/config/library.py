"""The flags of TRL's SFTConfig, known without importing it.

Importing SFTConfig takes several seconds (torch, PEFT and bitsandbytes come with it), and a mistyped flag
should not take that long to be told. So its fields are read from the installed library's source text; a test
compares them with the class itself, and where the text cannot be read so, the class is imported after all.
"""

import ast
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Settings of SFTConfig that something else decides here. Taking them and doing nothing would mislead.
NOT_TAKEN: dict[str, str] = {
    "accelerator_config": "Accelerate is set up by the trainer",
    "activation_checkpointing_kwargs": "recomputation is always of the non-reentrant kind",
    "activation_offloading": "use --checkpointing",
    "assistant_only_loss": "use --train_on answers",
    "auto_find_batch_size": "set -b",
    "average_tokens_across_devices": "the loss is always weighed by the tokens of all devices",
    "chat_template_path": "use --template",
    "completion_only_loss": "use --train_on answers",
    "dataset_kwargs": "data is prepared here, not by TRL",
    "dataset_text_field": "use --text_column",
    "debug": "not supported",
    "deepspeed": "not supported: every device holds a whole quantized replica",
    "do_eval": "use --eval_split",
    "do_predict": "use the generate command",
    "do_train": "the train command trains",
    "eos_token": "the tokenizer's own end token is used",
    "eval_packing": "evaluation packs as --packing says",
    "fsdp": "not supported: every device holds a whole quantized replica",
    "fsdp_config": "not supported: every device holds a whole quantized replica",
    "gradient_checkpointing_kwargs": "recomputation is always of the non-reentrant kind",
    "group_by_length": "use --train_sampling_strategy group_by_length",
    "ignore_data_skip": "a resumed run always goes on where it stopped",
    "include_num_input_tokens_seen": "tokens are always counted",
    "label_names": "batches are made here",
    "label_smoothing_factor": "not supported",
    "liger_kernel_config": "not supported for Falcon",
    "load_in_4bit": "use --quantize_mode 4bit",
    "load_in_8bit": "use --quantize_mode 8bit",
    "local_rank": "torchrun says which process this is",
    "loss_type": "the loss is the mean over the target tokens",
    "max_seq_length": "use --max_length",
    "model_init_kwargs": "models are loaded here: see the flags under Model",
    "no_cuda": "hide the GPUs with CUDA_VISIBLE_DEVICES=''",
    "optim_target_modules": "not supported with adapters",
    "pad_to_multiple_of": "use --padding",
    "pad_token": "padding is masked by position and needs no token",
    "padding_free": "use --packing",
    "packing_strategy": "use --packing and --overlong",
    "parallelism_config": "not supported: every device holds a whole quantized replica",
    "remove_unused_columns": "batches are made here",
    "resume_from_checkpoint": "use --resume",
    "router_aux_loss_coef": "Falcon is no mixture of experts",
    "shuffle_dataset": "use --train_sampling_strategy",
    "truncation_mode": "use --overlong",
    "trust_remote_code": "remote code is never run",
    "use_cache": "always off in training",
    "use_cpu": "hide the GPUs with CUDA_VISIBLE_DEVICES=''",
    "use_liger_kernel": "not supported for Falcon",
    "use_peft": "an adapter is always trained",
    "warmup_ratio": "--warmup_steps takes a ratio where it is below 1",
}

# The library is renaming the first of each to the second; users know the first.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

# Computed in the library's source, so not readable there.
_CHOICES_NOT_LITERAL = dict.fromkeys(
    ("log_level", "log_level_replica"), ("debug", "info", "warning", "error", "critical", "passive")
)

SECRETS = frozenset({"hub_token", "push_to_hub_token"})

_SOURCES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)


@dataclass(frozen=True, kw_only=True)
class LibraryField:
    """One field of SFTConfig.

    Attributes:
        kind: "bool", "int", "float", "str", "list" (of str) or "dict".
        optional: whether None is a value.
        choices: what it may be, where the library says.
        default: its default, or None where the library computes it.
    """

    name: str
    kind: str
    optional: bool
    choices: tuple[str, ...] | None
    default: Any
    help: str

    def annotation(self) -> Any:
        """The type under which the command line knows it."""
        if self.choices:
            base: Any = Literal[self.choices]
        else:
            base = {"bool": bool, "int": int, "float": float, "str": str, "list": list[str], "dict": str}[
                self.kind
            ]
        return base | None if self.optional else base


@functools.cache
def library_fields() -> dict[str, LibraryField]:
    """SFTConfig's fields that are taken here, by name."""
    try:
        fields = fields_from_source()
    except (OSError, SyntaxError, LookupError):
        fields = fields_from_class()
    return {name: field for name, field in fields.items() if name not in NOT_TAKEN}


def fields_from_source() -> dict[str, LibraryField]:
    """Read the fields from the installed source text.

    Raises:
        LookupError: where the text is not laid out as expected.
    """
    choices: dict[str, tuple[str, ...]] = {}
    fields: dict[str, LibraryField] = {}
    trees = {file: _tree(package, file) for package, file, _ in _SOURCES}
    for tree in (_tree("transformers", "trainer_utils.py"), trees["training_args.py"]):
        choices.update(_enumerations(tree))
    for _, file, name in _SOURCES:
        body = next(
            (node for node in trees[file].body if isinstance(node, ast.ClassDef) and node.name == name), None
        )
        if body is None:
            raise LookupError(f"{file} has no class {name}")
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                field_name = node.target.id
                if field_name not in NOT_TAKEN:
                    fields[field_name] = _from_node(field_name, node, choices)
    for old, new in RENAMED.items():
        if new in fields and old in fields:
            del fields[new]
    return fields


def fields_from_class() -> dict[str, LibraryField]:
    """Read the fields from the class itself; imports torch and all of TRL."""
    import enum
    import typing

    from trl import SFTConfig

    result = {}
    hints = typing.get_type_hints(SFTConfig)
    names = {field.name for field in dataclasses.fields(SFTConfig)}
    for field in dataclasses.fields(SFTConfig):
        if field.name in NOT_TAKEN or not field.init:
            continue
        if field.name in RENAMED.values() and any(RENAMED.get(name) == field.name for name in names):
            continue
        members = typing.get_args(hints[field.name]) or (hints[field.name],)
        if typing.get_origin(hints[field.name]) in (list, dict):
            members = (hints[field.name],)
        enums = [member for member in members if isinstance(member, type) and issubclass(member, enum.Enum)]
        parts = [
            member.__name__
            if isinstance(member, type) and typing.get_origin(member) is None
            else str(member).removeprefix("typing.")
            for member in members
        ]
        choices = tuple(item.value for item in enums[0]) if enums else None
        choices = choices or tuple(field.metadata.get("choices", ())) or None
        default = None if field.default is dataclasses.MISSING else field.default
        result[field.name] = _make(field.name, parts, choices, default, field.metadata.get("help", ""))
    return result


def _tree(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise LookupError(f"{package} is not installed")
    return ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))


def _enumerations(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "ExplicitEnum" for base in node.bases):
            values = [
                item.value.value
                for item in node.body
                if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
            ]
            yield node.name, tuple(dict.fromkeys(str(value) for value in values))


def _from_node(name: str, node: ast.AnnAssign, enumerations: dict[str, tuple[str, ...]]) -> LibraryField:
    parts = [part.strip() for part in ast.unparse(node.annotation).split("|")]
    if not isinstance(node.value, ast.Call):
        raise LookupError(f"{name} is not a field(...)")
    keywords = {keyword.arg: keyword.value for keyword in node.value.keywords}
    metadata: dict[str, ast.expr] = {}
    if isinstance(keywords.get("metadata"), ast.Dict):
        table = keywords["metadata"]
        assert isinstance(table, ast.Dict)
        metadata = {
            ast.literal_eval(key): value for key, value in zip(table.keys, table.values, strict=True) if key
        }
    choices = next((enumerations[part] for part in parts if part in enumerations), None)
    return _make(
        name,
        parts,
        choices or _literal(metadata.get("choices")),
        _literal(keywords.get("default")),
        _literal(metadata.get("help")) or "",
    )


def _literal(node: ast.expr | None) -> Any:
    """The value of a literal, or None where the library computes it."""
    try:
        value = ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
    return tuple(value) if isinstance(value, list) else value


def _make(name: str, parts: list[str], choices: Any, default: Any, text: str) -> LibraryField:
    """A field from the members of its annotation's union, as text."""
    optional = "None" in parts or "NoneType" in parts
    choices = _CHOICES_NOT_LITERAL.get(name, choices)
    named = [part for part in parts if part not in ("None", "NoneType")]
    if any(part.startswith("dict") for part in named):
        kind = "dict"
    elif any(part.startswith("list") for part in named):
        kind = "list"
    elif choices or "str" in named:
        kind = "str"
    elif len(named) == 1 and named[0] in ("bool", "int", "float"):
        kind = named[0]
    else:
        raise LookupError(f"{name} has a type that is not known here: {' | '.join(parts)}")
    return LibraryField(
        name=name,
        kind=kind,
        optional=optional,
        choices=tuple(str(choice) for choice in choices) if choices else None,
        default=getattr(default, "value", default),
        help=text.replace("%%", "%"),
    )
