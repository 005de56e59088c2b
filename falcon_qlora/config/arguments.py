"""The settings that every command shares, as dataclasses, and their flags.

Names are those of TRL and Transformers where these have one; the first reference's flags are aliases. A
default here holds unless a recipe, file or flag gives another value. `recipes/default.yaml` repeats the
defaults for the reader, and a test keeps the two the same. The settings of a method are its own fields.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from falcon_qlora.common.record_files import LATEST
from falcon_qlora.common.settings import Setting, setting, settings_of
from falcon_qlora.methods.table import METHODS, method_settings

# The trackers that Transformers reports to, repeated here so that it is not imported.
TRACKERS = (
    "wandb tensorboard trackio azure_ml clearml codecarbon comet_ml dagshub dvclive flyte kubeflow mlflow "
    "neptune swanlab none"
).split()


@dataclass(kw_only=True)
class ModelArguments:
    """Which base model, and how it is quantized."""

    _argument_group_name = "Model"

    model_name_or_path: str = setting(
        "ybelkada/falcon-7b-sharded-bf16",
        "Base model: a hub id, a folder (also at s3:// or gs://), `tiny` (packaged), or "
        "`random:falcon-7b` (made up).",
        "-m",
        "--model_name",
    )
    quantize_mode: Literal["4bit", "8bit", "16bit"] = setting(
        "4bit",
        "Storage of the frozen base weights.\n4bit: NF4\n8bit: LLM.int8()\n16bit: not quantized",
        "-q",
    )
    tokenizer_name_or_path: str | None = setting(
        None, "Take the tokenizer from this folder or hub id; unset: the model's own."
    )
    model_revision: str | None = setting(None, "Branch, tag or commit of the base model on the hub.")
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = setting(
        "auto",
        "Type to compute in.\nauto: bf16 where the GPU has it, else fp16; fp32 on the CPU\nbf16: bfloat16\n"
        "fp16: float16\nfp32: float32\nfp8: the frozen weights' products in FP8, all else in bf16: faster",
    )
    double_quantization: bool = setting(
        True, "4bit: quantize the quantization constants too; saves 0.37 bits a weight."
    )
    norms_in_float32: bool = setting(False, "Keep the norms' weights in float32.")
    llm_int8_threshold: float = setting(
        6.0, "8bit with --kernels off: activations above this are multiplied in 16 bits; 0: none.", least=0
    )
    kernels: Literal["auto", "portable", "off", "required"] = setting(
        "auto",
        "Fused blocks, with kernels of our own.\nauto: where supported\n"
        "portable: without optional libraries\noff: never\nrequired: else an error",
    )


@dataclass(kw_only=True)
class DataArguments:
    """Which rows, how they become text, and how the text becomes sequences."""

    _argument_group_name = "Data"

    dataset_name: list[str] = setting(
        ["timdettmers/openassistant-guanaco"],
        "Hub id, or a .jsonl, .json, .csv, .tsv or .parquet file, or a folder of them, also at s3:// or "
        "gs://; one or several.",
    )
    dataset_weights: list[float] | None = setting(
        None, "Proportions in which several datasets are drawn, in each epoch anew.", above=0
    )
    dataset_config: str | None = setting(None, "Configuration (subset) of a hub dataset.")
    dataset_train_split: str = setting("train", "Split to train on.")
    dataset_format: Literal[
        "auto", "text", "alpaca", "prompt_completion", "chat_completion", "chat", "sharegpt"
    ] = setting(
        "auto",
        "What the columns hold.\nauto: recognised by their names\ntext: text\n"
        "alpaca: instruction, input, output\nprompt_completion: prompt, completion\n"
        "chat_completion: the same, as lists of messages\nchat: messages\nsharegpt: conversations",
    )
    text_column: str | None = setting(None, "Column to read instead of `text`.")
    instruction_column: str | None = setting(None, "Column to read instead of `instruction`.")
    input_column: str | None = setting(None, "Column to read instead of `input`.")
    output_column: str | None = setting(None, "Column to read instead of `output`.")
    prompt_column: str | None = setting(None, "Column to read instead of `prompt`.")
    completion_column: str | None = setting(None, "Column to read instead of `completion`.")
    messages_column: str | None = setting(None, "Column to read instead of `messages`.")
    conversations_column: str | None = setting(None, "Column to read instead of `conversations`.")
    template: str = setting(
        "auto",
        "How a row becomes text: one of these, or a .jinja file.\n"
        "auto: tokenizer for chats if it has one, else format\nformat: as its format\n"
        "tokenizer: its own chat template\nalpaca: ### Instruction, ### Response\n"
        "guanaco: ### Human, ### Assistant\nfalcon-instruct: User, Assistant\nnone: as it is",
    )
    train_on: Literal["answers", "all"] = setting(
        "answers",
        "Which tokens the loss counts.\nanswers: the answers', where the format has prompts\nall: all",
    )
    append_end_token: bool = setting(True, "End every answer with the end token.")
    max_length: int = setting(2048, "Longest sequence, in tokens.", least=2)
    overlong: Literal["split", "truncate", "drop"] = setting(
        "split",
        "What to do with a document longer than --max_length.\nsplit: cut it into pieces\n"
        "truncate: keep its beginning\ndrop: leave it out",
    )
    packing: bool = setting(
        True, "Lay documents end to end (attention stays within each) instead of padding."
    )
    padding: Literal["longest", "max_length"] = setting(
        "longest",
        "Without packing: to what sequences are padded.\nlongest: the longest of the batch\n"
        "max_length: always --max_length",
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = setting(
        "random",
        "Order of the documents.\nrandom: drawn anew in each epoch\nsequential: as they are\n"
        "group_by_length: like lengths together; needs --packing false",
    )
    eval_split: str | None = setting(
        None, "Held-out rows: a fraction (0.05), a file or hub id, or split:NAME of the same data set."
    )
    streaming: bool = setting(
        False, "Read rows as they are needed, for data larger than the disk; needs --max_steps."
    )
    max_rows: int | None = setting(
        None, "Use at most this many rows, evenly from the data sets of --dataset_name.", least=1
    )
    dataset_num_proc: int | None = setting(None, "Threads that tokenize; unset: one a core.", least=1)
    cache_dir: str | None = setting(None, "Where tokenized data is cached; unset: the user's cache folder.")

    def columns(self) -> dict[str, str]:
        """Standard column name to its name in the user's data, for columns with another name there."""
        named = (
            (name.removesuffix("_column"), given) for name, given in vars(self).items() if "_column" in name
        )
        return {standard: given for standard, given in named if given is not None}


@dataclass(kw_only=True)
class MethodArguments:
    """Which method; its settings are fields of the method."""

    _argument_group_name = "Method"

    method: str = setting("lora", "What is trained.")


@dataclass(kw_only=True)
class RunArguments:
    """How long, how large a batch, where it writes; what the trainer's own settings do not cover."""

    _argument_group_name = "Run"

    recipe: str = setting("default", "Ready settings: a name, or a YAML file.")
    adapter: str | None = setting(
        None,
        "Begin with this trained adapter: folder of a run, its adapter or a checkpoint, or PEFT's. Its "
        "method and settings are taken over.",
    )
    adapter_sha256: str | None = setting(
        None, "Refuse an --adapter whose weights have another SHA-256; the settings of a run note it."
    )
    output_dir: str | None = setting(
        None,
        "Run directory; unset: a fresh one under runs/. s3://BUCKET/RUN, gs://BUCKET/RUN: a local one, "
        "copied there.",
    )
    config: str | None = setting(None, "Settings from a YAML file, such as the config.yaml of a run.")
    resume: str | None = setting(
        None,
        "Go on from the newest checkpoint of --output_dir, from this one, or from a run at s3:// or gs://. "
        "auto: a fresh run where --output_dir has none yet, so that one command starts and goes on.",
        alone=LATEST,
    )
    overwrite: bool = setting(False, "Replace the run that --output_dir holds.")
    dry_run: bool = setting(
        False,
        "Try everything up to the first step on every rank, and one step on the longest batch with its save; "
        "leave nothing behind.",
    )
    device: Literal["auto", "cpu"] = setting(
        "auto",
        "Where it computes.\nauto: on GPUs; without any, models of up to 10^9 parameters on the CPU\n"
        "cpu: on the CPU, whatever the model and the machine",
    )
    num_train_epochs: float = setting(1.0, "Passes over the data.", above=0)
    max_steps: int = setting(
        -1,
        "Optimizer steps, instead of --num_train_epochs; -1: as many as those take. Of the two a flag wins "
        "over a file, which wins over a recipe; in one file the steps win, and two flags are refused.",
        "-s",
        "--steps",
    )
    per_device_train_batch_size: int = setting(
        4,
        "Sequences of --max_length on each device at a time; packed, --batch_tokens may cut them anew.",
        "-b",
        "--batch_size_per_device",
        least=1,
    )
    gradient_accumulation_steps: int = setting(
        1, "Micro batches to an optimizer step, on each device.", least=1
    )
    global_batch_size: int | None = setting(
        None,
        "Sequences of --max_length to a step over all devices, instead of --gradient_accumulation_steps.",
        least=1,
    )
    batch_tokens: str = setting(
        "auto",
        "Tokens of a packed micro batch. It cuts a step, whose size -b, --gradient_accumulation_steps and "
        "--global_batch_size say.\n"
        "auto: the fastest up to 16,384 that fits the card, whatever is free; as -b on the CPU, and with "
        "--sharding fsdp or zero3\n"
        "N: at most so many",
    )
    checkpointing: Literal["auto", "none", "selective", "full", "offload"] = setting(
        "auto",
        "Activation checkpointing: what blocks recompute in the backward pass.\n"
        "auto: as little as memory allows, block by block\nnone: nothing\nselective: the largest activation\n"
        "full: all\noffload: all, from inputs in CPU memory",
    )
    save_every_minutes: float = setting(
        10.0,
        "Save a checkpoint whenever so many minutes have passed since the last; 0: never. Off with "
        "--save_steps or --save_strategy, unless you give this flag too.",
        least=0,
    )
    max_bad_steps: int = setting(
        10,
        "Stop after so many steps in a row with a non-finite loss or gradient (each is skipped); 0: never.",
        least=0,
    )
    hang_minutes: float = setting(
        15.0,
        "End the run where a process hangs for so long, naming it; 0: never.",
        least=0,
    )
    meet_minutes: float = setting(
        5.0,
        "Wait so long at the start for processes that have not come, and say which they are.",
        above=0,
    )
    sharding: Literal["auto", "none", "fsdp", "zero3"] = setting(
        "auto",
        "How several processes hold the model.\n"
        "auto: a replica on each; fsdp where one of --method full with its optimizer fits no GPU\n"
        "none: a replica on each\nfsdp: shared out, and gathered block by block; under an adapter, of the "
        "blocks' frozen weights\n"
        "zero3: --method full sharded by DeepSpeed, with float32 weights beside bf16 ones",
    )
    offload_base: bool = setting(
        False,
        "Keep the blocks' frozen weights in CPU memory and copy each block to the GPU ahead of its use, for "
        "models larger than a GPU. `falcon-qlora estimate` says what that costs.",
    )
    early_stopping: int = setting(
        0, "Stop after this many evaluations without a better loss; 0: never.", least=0
    )
    generate_samples: int = setting(0, "Sample answers to generate at each evaluation.", least=0)
    sample_prompts: list[str] | None = setting(
        None, "Prompts for those; unset: taken from the held-out rows."
    )
    report_to: list[str] = setting(["wandb"], "Trackers to report to.", choices=TRACKERS)
    wandb_project: str | None = setting(None, "Project at W&B; unset: WANDB_PROJECT, else falcon-qlora.")
    wandb_entity: str | None = setting(None, "User or team at W&B; unset: WANDB_ENTITY, else one's own.")
    seed: int = setting(
        42, "Decides the order of the data, the adapter's start and dropout.", least=0, below=2**32
    )


@dataclass(kw_only=True)
class LaunchArguments:
    """Which processes are started; under torchrun, use its own flags instead."""

    _argument_group_name = "Processes"

    gpus: int | None = setting(
        None,
        "Processes to start on this node, one a GPU; unset: every visible GPU. Without GPUs: this many CPU "
        "processes, by default 1.",
        least=1,
    )
    nnodes: str = setting("1", "Nodes, or MIN:MAX.")
    node_rank: int | None = setting(None, "This node's index, with --master_addr.", least=0)
    master_addr: str | None = setting(None, "Address of the first node.")
    master_port: int | None = setting(None, "Free port on the first node.", least=0, below=2**16)
    rdzv_backend: str | None = setting(None, "How nodes meet, such as c10d.")
    rdzv_endpoint: str | None = setting(None, "Where nodes meet: HOST:PORT.")
    rdzv_id: str | None = setting(None, "Name of this job, the same on every node.")
    rdzv_conf: str | None = setting(None, "Arguments of the backend: key=value,…")
    local_addr: str | None = setting(None, "This node's address for the others; unset: its host name.")
    max_restarts: int = setting(0, "Restarts after a process has failed.", least=0)


def our_settings() -> list[Setting]:
    """All settings that are not the trainer's own, in the order of the help page."""
    (method,) = settings_of(MethodArguments)
    told = "\n".join(f"{name}: {each.trains}" for name, each in METHODS.items())
    method = dataclasses.replace(method, help=f"What is trained.\n{told}", choices=tuple(METHODS))
    return [
        *settings_of(ModelArguments),
        *settings_of(DataArguments),
        method,
        *method_settings().values(),
        *settings_of(RunArguments),
    ]
