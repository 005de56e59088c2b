"""The settings that are forwarded to TRL's trainer, and what to use instead of some that are not.

Importing SFTConfig takes several seconds, too long for reporting a mistyped flag, so the forwarded fields are
repeated here. A test compares their types and defaults with the installed class.
"""

from dataclasses import dataclass
from typing import Any, Literal

from falcon_qlora.common.settings import setting

# Transformers' other optimizers cannot run here: they need another device, parameters that no adapter has, a
# step of their own, or a library whose state is not in a checkpoint.
_Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit",
    "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
]  # fmt: skip
_Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay", "greedy",
]  # fmt: skip


@dataclass(kw_only=True)
class TrainerArguments:
    """Fields of SFTConfig, documented there. A number of steps below 1 is a share of all steps."""

    _argument_group_name = "Trainer"

    # Optimizer
    learning_rate: float = setting(2e-5, "Peak learning rate.", least=0)
    lr_scheduler_type: _Scheduler = setting("linear", "Schedule of the learning rate.")
    lr_scheduler_kwargs: dict[str, Any] | None = setting(
        None,
        'Schedule arguments as JSON: {"num_cycles": 1} for cosine_with_restarts. Unset, those with a '
        "least rate end at a tenth of the peak, and warmup_stable_decay falls in the last tenth of steps.",
    )
    warmup_steps: float = setting(
        0,
        "Linear warmup: steps, or a share of all; the first step has the second's rate.",
        least=0,
    )
    optim: _Optimizer = setting("adamw_torch_fused", "Optimizer.")
    optim_args: str | None = setting(None, "Optimizer arguments: key=value,…")
    weight_decay: float = setting(0.0, "Weight decay; none of biases and norms.", least=0)
    adam_beta1: float = setting(0.9, "Decay of Adam's first moment.", least=0, below=1)
    adam_beta2: float = setting(0.999, "Decay of Adam's second moment.", least=0, below=1)
    adam_epsilon: float = setting(1e-8, "Adam's epsilon.", least=0)
    max_grad_norm: float = setting(1.0, "Norm to which the gradient is clipped; 0: not clipped.", least=0)
    neftune_noise_alpha: float | None = setting(None, "Strength of NEFTune's noise on embeddings, 5 to 15.")

    # Precision and memory. The first three are other names for values of --compute_dtype and --checkpointing.
    bf16: bool | None = setting(None, "--compute_dtype bf16.")
    fp16: bool = setting(False, "--compute_dtype fp16.")
    gradient_checkpointing: bool = setting(
        True, "--checkpointing full, or none.", "--activation_checkpointing"
    )
    tf32: bool | None = setting(None, "Multiply float32 matrices in TF32.")

    # Logging
    logging_strategy: Literal["no", "steps", "epoch"] = setting("steps", "When to log.")
    logging_steps: float = setting(
        10,
        "Steps between two lines of metrics.jsonl, or a share of all; without a terminal some 50 are shown.",
        above=0,
    )
    logging_first_step: bool = setting(False, "Log the first step too.")
    run_name: str | None = setting(None, "Name of the run for trackers; unset: its folder's.")
    project: str = setting("huggingface", "Project for Trackio.")
    trackio_space_id: str | None = setting(None, "Hugging Face Space for Trackio.")
    trackio_bucket_id: str | None = setting(None, "Hugging Face Bucket for Trackio with a Space.")
    trackio_static_space_id: str | None = setting(None, "Static Space for Trackio's dashboard.")

    # Evaluation
    eval_strategy: Literal["no", "steps", "epoch"] = setting("no", "When to evaluate.")
    eval_steps: float | None = setting(None, "Steps between two evaluations, or a share of all.", above=0)
    eval_delay: float = setting(0, "Steps or epochs before the first evaluation.", least=0)
    eval_on_start: bool = setting(False, "Evaluate before the first step too.")
    per_device_eval_batch_size: int = setting(8, "Sequences to evaluate on each device at a time.", least=1)

    # Checkpoints
    save_strategy: Literal["no", "steps", "epoch", "best"] = setting("steps", "When to save a checkpoint.")
    save_steps: float | None = setting(
        None, "Steps between two checkpoints, or a share of all; unset: by the clock.", above=0
    )
    save_total_limit: int | None = setting(
        None,
        "Checkpoints to keep: the last ones, and the best among them (with 1: the last and the best).",
        least=1,
    )
    save_only_model: bool = setting(False, "Save weights only: such a checkpoint cannot be resumed.")
    load_best_model_at_end: bool = setting(False, "Keep the best checkpoint's adapter, not the last step's.")

    # Hub
    push_to_hub: bool = setting(
        False, "Upload what the command has made to the hub, once it is done; needs --hub_model_id."
    )
    hub_token: str | None = setting(None, "Token for it; unset: that of `hf auth login`.", secret=True)
    hub_private_repo: bool | None = setting(None, "Make the repository private.")
    hub_model_id: str | None = setting(None, "Repository on the hub: NAME/MODEL.")
    hub_revision: str | None = setting(None, "Branch to push to.")

    # Reproducibility, and reading rows
    full_determinism: bool = setting(False, "Deterministic operations only: slow.")
    dataloader_num_workers: int = setting(0, "Processes that read batches ahead; 0: none.", least=0)
    dataloader_pin_memory: bool = setting(True, "Pin the memory of batches.")

    # Processes
    ddp_backend: Literal["nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"] | None = setting(
        None, "Backend for communication between processes."
    )
    ddp_timeout: int = setting(1800, "Seconds that one process waits for another.", least=1)


# Our settings that are also passed to the trainer, under the same name.
SHARED = (
    "output_dir num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
    "max_length packing train_sampling_strategy dataset_num_proc report_to seed"
).split()

_SHARED_OUT = "--sharding fsdp shares the frozen base out over the GPUs"
_REENTRANT = "recomputation is always of the non-reentrant kind"
_LOSS = "an evaluation keeps nothing but the loss"
_NO_DDP = "gradients are summed without DistributedDataParallel"
_COMPILE = "use --kernels: packed rows would be compiled anew for every length"
_BATCHES = "batches follow from the plan of the run, in order: use --dataloader_num_workers"

# What to use instead of other settings that users of Transformers and TRL know.
INSTEAD = {
    "accelerator_config": "Accelerate is set up by the trainer",
    "activation_checkpointing_kwargs": _REENTRANT,
    "activation_offloading": "use --checkpointing",
    "assistant_only_loss": "use --train_on answers",
    "auto_find_batch_size": "set -b",
    "average_tokens_across_devices": "the loss is always weighed by the tokens of all devices",
    "batch_eval_metrics": _LOSS,
    "bf16_full_eval": "evaluation computes in --compute_dtype",
    "chat_template_path": "use --template",
    "completion_only_loss": "use --train_on answers",
    "data_seed": "use --seed, which decides the order of the data too",
    "dataloader_drop_last": _BATCHES,
    "dataloader_in_order": _BATCHES,
    "dataloader_multiprocessing_context": _BATCHES,
    "dataloader_persistent_workers": _BATCHES,
    "dataloader_prefetch_factor": _BATCHES,
    "dataset_kwargs": "data is prepared here, not by TRL",
    "dataset_text_field": "use --text_column",
    "ddp_broadcast_buffers": _NO_DDP,
    "ddp_bucket_cap_mb": _NO_DDP,
    "ddp_find_unused_parameters": _NO_DDP,
    "ddp_static_graph": _NO_DDP,
    "deepspeed": f"{_SHARED_OUT}, and zero3 the whole model with --method full",
    "disable_tqdm": "what a run prints follows from the terminal; its log is metrics.jsonl",
    "do_eval": "use --eval_split",
    "do_predict": "use the generate command",
    "do_train": "the train command trains",
    "enable_jit_checkpoint": "SIGTERM always saves a checkpoint",
    "eos_token": "the tokenizer's own end token is used",
    "eval_accumulation_steps": _LOSS,
    "eval_do_concat_batches": _LOSS,
    "eval_packing": "evaluation packs as --packing says",
    "eval_use_gather_object": _LOSS,
    "fp16_full_eval": "evaluation computes in --compute_dtype",
    "fsdp": _SHARED_OUT,
    "fsdp_config": _SHARED_OUT,
    "gradient_checkpointing_kwargs": _REENTRANT,
    "greater_is_better": "the best checkpoint is the one of the lowest held-out loss",
    "group_by_length": "use --train_sampling_strategy group_by_length",
    "hub_always_push": "--push_to_hub uploads the adapter once, when the run is done",
    "hub_strategy": "--push_to_hub uploads the adapter once, when the run is done",
    "ignore_data_skip": "a resumed run always goes on where it stopped",
    "include_for_metrics": _LOSS,
    "include_num_input_tokens_seen": "tokens are always counted",
    "length_column_name": "lengths are counted in tokens, see --train_sampling_strategy group_by_length",
    "load_in_4bit": "use --quantize_mode 4bit",
    "load_in_8bit": "use --quantize_mode 8bit",
    "local_rank": "torchrun says which process this is",
    "log_level": "what a run prints follows from the terminal; its log is metrics.jsonl",
    "log_level_replica": "what a run prints follows from the terminal; its log is metrics.jsonl",
    "log_on_each_node": "rank 0 writes for all machines, into an --output_dir that they share",
    "logging_nan_inf_filter": "the log shows a non-finite loss as it is, see --max_bad_steps",
    "loss_type": "the loss is the mean over the target tokens",
    "max_seq_length": "use --max_length",
    "metric_for_best_model": "the best checkpoint is the one of the lowest held-out loss",
    "model_init_kwargs": "models are loaded here: see the flags under Model",
    "no_cuda": "use --device cpu",
    "packing_strategy": "use --packing and --overlong",
    "pad_to_multiple_of": "use --padding",
    "pad_token": "padding is masked by position and needs no token",
    "padding_free": "use --packing",
    "parallelism_config": _SHARED_OUT,
    "prediction_loss_only": _LOSS,
    "restore_callback_states_from_checkpoint": "a resumed run always goes on where it stopped",
    "resume_from_checkpoint": "use --resume",
    "save_on_each_node": "rank 0 writes for all machines, into an --output_dir that they share",
    "shuffle_dataset": "use --train_sampling_strategy",
    "skip_memory_metrics": "every line of metrics.jsonl has the peak memory",
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "torch_empty_cache_steps": "use --checkpointing, or a smaller -b",
    "truncation_mode": "use --overlong",
    "trust_remote_code": "remote code is never run",
    "use_cache": "always off in training",
    "use_cpu": "use --device cpu",
    "use_peft": "an adapter is always trained",
    "warmup_ratio": "--warmup_steps takes a ratio where it is below 1",
}

# The values that files may give these: those that hold here, and the libraries' defaults. For others: None.
_OFF = (
    "activation_offloading assistant_only_loss auto_find_batch_size batch_eval_metrics bf16_full_eval "
    "dataloader_drop_last dataloader_persistent_workers do_eval do_predict enable_jit_checkpoint "
    "eval_use_gather_object fp16_full_eval group_by_length hub_always_push ignore_data_skip no_cuda "
    "padding_free save_on_each_node shuffle_dataset torch_compile trust_remote_code use_cache use_cpu"
).split()
_ON = (
    "average_tokens_across_devices dataloader_in_order eval_do_concat_batches log_on_each_node "
    "skip_memory_metrics"
).split()
_HOLDING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_OFF, (False,)),
    **dict.fromkeys(_ON, (True,)),
    **dict.fromkeys(("do_train", "logging_nan_inf_filter", "prediction_loss_only"), (True, False)),
    **dict.fromkeys(("ddp_find_unused_parameters", "greater_is_better"), (None, False)),
    "dataset_text_field": ("text",),
    "disable_tqdm": (None, True),
    "gradient_checkpointing_kwargs": (None, {"use_reentrant": False}),
    "hub_strategy": ("every_save", "end"),
    "include_for_metrics": ([],),
    "include_num_input_tokens_seen": ("no",),
    "length_column_name": ("length",),
    "local_rank": (-1,),
    "log_level": ("passive",),
    "log_level_replica": ("warning",),
    "loss_type": ("nll",),
    "metric_for_best_model": (None, "loss", "eval_loss"),
    "packing_strategy": ("bfd",),
    "pad_to_multiple_of": (None, "auto"),
    "restore_callback_states_from_checkpoint": (False, True),
    "truncation_mode": ("keep_start",),
    "use_peft": (True,),
    "warmup_ratio": (0,),
}


def holds_anyway(name: str, value: Any) -> bool:
    """Whether an unsupported setting has a value that changes nothing in a run."""
    return value in _HOLDING.get(name, (None,))
