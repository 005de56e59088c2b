"""The settings of TRL's trainer that are forwarded to it, and what to use instead of some that are not.

Importing SFTConfig takes several seconds, and a mistyped flag should not take that long to be told: so the
forwarded fields are named here once more. A test compares their types and defaults with the installed class.
"""

from dataclasses import dataclass
from typing import Any, Literal

from falcon_qlora.common.settings import setting

_LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
_Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor",
    "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad",
    "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit",
    "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise",
    "lomo", "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd",
    "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
]  # fmt: skip
_Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay", "greedy",
]  # fmt: skip


@dataclass(kw_only=True)
class TrainerArguments:
    """Fields of SFTConfig, which see: a number of steps below 1 is a share of all steps."""

    _argument_group_name = "Trainer"

    # Optimizer
    learning_rate: float = setting(2e-5, "Peak learning rate.", least=0)
    lr_scheduler_type: _Scheduler = setting("linear", "Schedule of the learning rate.")
    lr_scheduler_kwargs: dict[str, Any] | None = setting(
        None, 'More for the schedule, as JSON: {"num_cycles": 1} for cosine_with_restarts.'
    )
    warmup_steps: float = setting(
        0,
        "Steps in which the learning rate rises from 0, or their share; the first has the second's rate.",
        least=0,
    )
    optim: _Optimizer = setting("adamw_torch_fused", "Optimizer.")
    optim_args: str | None = setting(None, "More for the optimizer: key=value,…")
    weight_decay: float = setting(0.0, "Weight decay; none of biases and norms.", least=0)
    adam_beta1: float = setting(0.9, "Decay of Adam's first moment.", least=0, below=1)
    adam_beta2: float = setting(0.999, "Decay of Adam's second moment.", least=0, below=1)
    adam_epsilon: float = setting(1e-8, "Adam's epsilon.", least=0)
    max_grad_norm: float = setting(1.0, "Norm to which the gradient is clipped; 0: not clipped.", least=0)
    neftune_noise_alpha: float | None = setting(None, "Strength of NEFTune's noise on embeddings, 5 to 15.")

    # Precision and memory. The first three are other names for what --compute_dtype and --checkpointing say.
    bf16: bool | None = setting(None, "--compute_dtype bf16.")
    fp16: bool = setting(False, "--compute_dtype fp16.")
    gradient_checkpointing: bool = setting(
        True, "--checkpointing full, or none.", "--activation_checkpointing"
    )
    bf16_full_eval: bool = setting(False, "Evaluate in bf16 throughout.")
    fp16_full_eval: bool = setting(False, "Evaluate in fp16 throughout.")
    tf32: bool | None = setting(None, "Multiply float32 matrices in TF32.")
    torch_compile: bool = setting(False, "Compile the model with torch.compile.")
    torch_compile_backend: str | None = setting(None, "Backend of torch.compile; switches it on.")
    torch_compile_mode: str | None = setting(None, "Mode of torch.compile; switches it on.")
    torch_empty_cache_steps: int | None = setting(None, "Steps between two emptyings of the GPU's cache.")

    # Logging
    logging_strategy: Literal["no", "steps", "epoch"] = setting("steps", "When to log.")
    logging_steps: float = setting(10, "Steps between two lines of the log, or their share.", above=0)
    logging_first_step: bool = setting(False, "Log the first step too.")
    logging_nan_inf_filter: bool = setting(True, "Leave non-finite losses out of the log.")
    log_on_each_node: bool = setting(True, "Log once a node, instead of once.")
    log_level: _LogLevel = setting("passive", "Level of the libraries' log on the main process.")
    log_level_replica: _LogLevel = setting("warning", "Level of the libraries' log on the others.")
    disable_tqdm: bool | None = setting(None, "No progress bars of the libraries.")
    run_name: str | None = setting(None, "Name of the run for trackers.")
    project: str = setting("huggingface", "Project for Trackio.")
    trackio_space_id: str | None = setting(None, "Hugging Face Space for Trackio.")
    trackio_bucket_id: str | None = setting(None, "Hugging Face Bucket for Trackio with a Space.")
    trackio_static_space_id: str | None = setting(None, "Static Space for Trackio's dashboard.")
    skip_memory_metrics: bool = setting(True, "No memory profile, which slows training down.")

    # Evaluation
    eval_strategy: Literal["no", "steps", "epoch"] = setting("no", "When to evaluate.")
    eval_steps: float | None = setting(None, "Steps between two evaluations, or their share.", above=0)
    eval_delay: float = setting(0, "Steps or epochs before the first evaluation.", least=0)
    eval_on_start: bool = setting(False, "Evaluate before the first step too.")
    per_device_eval_batch_size: int = setting(8, "Sequences to evaluate on each device at a time.", least=1)
    prediction_loss_only: bool = setting(False, "Keep nothing of an evaluation but its loss.")
    eval_accumulation_steps: int | None = setting(None, "Batches of predictions to keep on the device.")
    eval_do_concat_batches: bool = setting(True, "Join the batches of predictions.")
    eval_use_gather_object: bool = setting(False, "Gather predictions as objects.")
    include_for_metrics: list[str] = setting([], "What metrics get: inputs, loss.")
    batch_eval_metrics: bool = setting(False, "Compute metrics batch by batch.")

    # Checkpoints
    save_strategy: Literal["no", "steps", "epoch", "best"] = setting("steps", "When to save a checkpoint.")
    save_steps: float = setting(500, "Steps between two checkpoints, or their share.", above=0)
    save_total_limit: int | None = setting(None, "Checkpoints to keep, the best one besides.", least=1)
    save_only_model: bool = setting(False, "Save weights only: such a checkpoint cannot be resumed.")
    save_on_each_node: bool = setting(False, "Save on every node, instead of on the main one.")
    load_best_model_at_end: bool = setting(False, "Keep the best checkpoint's adapter, not the last step's.")
    metric_for_best_model: str | None = setting(None, "What tells the best checkpoint; unset: the loss.")
    greater_is_better: bool | None = setting(None, "Whether more of that is better.")
    restore_callback_states_from_checkpoint: bool = setting(False, "Resume callbacks where they were.")
    enable_jit_checkpoint: bool = setting(False, "Save a checkpoint at SIGTERM.")

    # Hub
    push_to_hub: bool = setting(False, "Push the adapter to the hub at each save.")
    hub_token: str | None = setting(None, "Token for it; unset: that of `hf auth login`.", secret=True)
    hub_private_repo: bool | None = setting(None, "Make the repository private.")
    hub_model_id: str | None = setting(None, "Name of the repository.")
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = setting(
        "every_save", "What is pushed, and when."
    )
    hub_always_push: bool = setting(False, "Push even while the push before goes on.")
    hub_revision: str | None = setting(None, "Branch to push to.")

    # Reproducibility, and reading rows
    full_determinism: bool = setting(False, "Deterministic operations only: slow.")
    data_seed: int | None = setting(None, "Seed of data samplers.")
    dataloader_num_workers: int = setting(0, "Processes that read batches ahead; 0: none.", least=0)
    dataloader_pin_memory: bool = setting(True, "Pin the memory of batches.")
    dataloader_prefetch_factor: int | None = setting(None, "Batches that each of them has ready.", least=1)
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = setting(
        None, "How they are started."
    )
    dataloader_persistent_workers: bool = setting(False, "Keep them for the next epoch.")
    dataloader_in_order: bool = setting(True, "Take batches in order, also where a later one is ready first.")
    dataloader_drop_last: bool = setting(False, "Drop the last batch if it is smaller.")
    length_column_name: str = setting("length", "Column with the lengths of documents.")

    # Processes
    ddp_backend: Literal["nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"] | None = setting(
        None, "How processes talk to each other."
    )
    ddp_timeout: int = setting(1800, "Seconds that one process waits for another.", least=1)
    ddp_find_unused_parameters: bool | None = setting(None, "Of DistributedDataParallel.")
    ddp_bucket_cap_mb: int | None = setting(None, "Of DistributedDataParallel.")
    ddp_broadcast_buffers: bool | None = setting(None, "Of DistributedDataParallel.")
    ddp_static_graph: bool | None = setting(None, "Of DistributedDataParallel.")


# Settings of ours that the trainer is given too, under the same name.
SHARED = (
    "output_dir num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
    "max_length packing train_sampling_strategy dataset_num_proc report_to seed"
).split()

_REPLICA = "not supported: every device holds a whole quantized replica"
_REENTRANT = "recomputation is always of the non-reentrant kind"

# What to use instead of others that users of Transformers and TRL know.
INSTEAD = {
    "accelerator_config": "Accelerate is set up by the trainer",
    "activation_checkpointing_kwargs": _REENTRANT,
    "activation_offloading": "use --checkpointing",
    "assistant_only_loss": "use --train_on answers",
    "auto_find_batch_size": "set -b",
    "average_tokens_across_devices": "the loss is always weighed by the tokens of all devices",
    "chat_template_path": "use --template",
    "completion_only_loss": "use --train_on answers",
    "dataset_kwargs": "data is prepared here, not by TRL",
    "dataset_text_field": "use --text_column",
    "deepspeed": _REPLICA,
    "do_eval": "use --eval_split",
    "do_predict": "use the generate command",
    "do_train": "the train command trains",
    "eos_token": "the tokenizer's own end token is used",
    "eval_packing": "evaluation packs as --packing says",
    "fsdp": _REPLICA,
    "fsdp_config": _REPLICA,
    "gradient_checkpointing_kwargs": _REENTRANT,
    "group_by_length": "use --train_sampling_strategy group_by_length",
    "ignore_data_skip": "a resumed run always goes on where it stopped",
    "include_num_input_tokens_seen": "tokens are always counted",
    "load_in_4bit": "use --quantize_mode 4bit",
    "load_in_8bit": "use --quantize_mode 8bit",
    "local_rank": "torchrun says which process this is",
    "loss_type": "the loss is the mean over the target tokens",
    "max_seq_length": "use --max_length",
    "model_init_kwargs": "models are loaded here: see the flags under Model",
    "no_cuda": "hide the GPUs with CUDA_VISIBLE_DEVICES=''",
    "pad_to_multiple_of": "use --padding",
    "pad_token": "padding is masked by position and needs no token",
    "padding_free": "use --packing",
    "packing_strategy": "use --packing and --overlong",
    "parallelism_config": _REPLICA,
    "resume_from_checkpoint": "use --resume",
    "shuffle_dataset": "use --train_sampling_strategy",
    "truncation_mode": "use --overlong",
    "trust_remote_code": "remote code is never run",
    "use_cache": "always off in training",
    "use_cpu": "hide the GPUs with CUDA_VISIBLE_DEVICES=''",
    "use_peft": "an adapter is always trained",
    "warmup_ratio": "--warmup_steps takes a ratio where it is below 1",
}
