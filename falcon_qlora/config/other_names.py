"""Names that other tools, and people, use for settings, values and commands with another name here.

An entry ``setting`` takes the value that was given; in ``setting=split:{}``, ``{}`` stands for that value. In
``setting=A|B``, A replaces true and B replaces false; where that is empty, the setting is left out. A remark
follows ``; ``. An entry without a setting has no counterpart here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_ALWAYS_SFT = "; training is always supervised fine-tuning"
_KERNELS = "; kernels are chosen by themselves, see --kernels"
_ATTENTION = "; attention is chosen by itself, and stays within each document"
_MERGE = "; see falcon-qlora merge --help"
_WANDB = "; wandb reads it from the environment: WANDB_{}"
_TOKENS = "; the tokenizer's own special tokens are used"
_REPLICA = "; each GPU holds a whole replica, unless --sharding fsdp shares it out"
_MIN_LR = "; see --lr_scheduler_type cosine_with_min_lr and --lr_scheduler_kwargs"
_NO_DPO = "; preference training is not supported"
_NO_MODULES = "; no whole modules are trained beside an adapter; --new_tokens trains tokens' rows"
_SAVED = "; checkpoints are always safetensors"
_BATCH = "per_device_train_batch_size"
_SHARE = "; below 1 a share of all steps: this is ten times a run"

_BY_TOOL: dict[str, dict[str, str]] = {
    "": {  # of no tool in particular
        "accumulation_steps": "gradient_accumulation_steps",
        "alpha": "lora_alpha",
        "base": "model_name_or_path",
        "bs": _BATCH,
        "batch": _BATCH,
        "batch_size": f"{_BATCH}; of one device, where global_batch_size is of a step over all",
        "bits": "quantize_mode",
        "block_size": "max_length",
        "checkpoint_dir": "model_name_or_path; to go on from a checkpoint: --resume",
        "context_length": "max_length",
        "cuda": "; every visible GPU is used",
        "data": "dataset_name",
        "data_path": "dataset_name",
        "dataset": "dataset_name",
        "dataset_path": "dataset_name",
        "dev_file": "eval_split",
        "device_map": _REPLICA,
        "devices": "gpus",
        "dropout": "lora_dropout",
        "dtype": "compute_dtype",
        "epoch": "num_train_epochs",
        "epochs": "num_train_epochs",
        "eval_batch_size": "per_device_eval_batch_size",
        "eval_dataset": "eval_split",
        "eval_every": "eval_steps",
        "eval_file": "eval_split",
        "from_checkpoint": "resume",
        "gpu": "; CUDA_VISIBLE_DEVICES names the GPUs, and --gpus N takes the first N",
        "grad_accum": "gradient_accumulation_steps",
        "grad_clip": "max_grad_norm",
        "gradient_accumulation": "gradient_accumulation_steps",
        "gradient_clipping": "max_grad_norm",
        "input_file": "dataset_name",
        "iters": "max_steps",
        "log_every": "logging_steps",
        "log_interval": "logging_steps",
        "lora_rank": "lora_r",
        "lr": "learning_rate",
        "lrate": "learning_rate",
        "max_epochs": "num_train_epochs",
        "max_iters": "max_steps",
        "max_len": "max_length",
        "max_norm": "max_grad_norm",
        "max_seq_len": "max_length",
        "max_tokens": "max_length",
        "model": "model_name_or_path",
        "model_id": "model_name_or_path",
        "model_path": "model_name_or_path",
        "n_epochs": "num_train_epochs",
        "n_gpus": "gpus",
        "name": "run_name",
        "nproc_per_node": "gpus",
        "num_epochs": "num_train_epochs",
        "num_gpus": "gpus",
        "num_iterations": "max_steps",
        "num_nodes": "nnodes",
        "num_processes": "gpus",
        "num_steps": "max_steps",
        "num_train_steps": "max_steps",
        "num_workers": "dataloader_num_workers",
        "optimizer": "optim",
        "out_dir": "output_dir",
        "out": "output_dir",
        "output": "output_dir",
        "output_path": "output_dir",
        "prompt_template": "template",
        "quantization": "quantize_mode",
        "quantize": "quantize_mode",
        "r": "lora_r",
        "random_seed": "seed",
        "rank": "lora_r",
        "save_every": "save_steps",
        "save_interval": "save_steps",
        "scheduler": "lr_scheduler_type",
        "seq_len": "max_length",
        "seq_length": "max_length",
        "sequence_length": "max_length",
        "target_modules": "lora_target_modules",
        "test_size": "eval_split",
        "tokenizer": "tokenizer_name_or_path",
        "train_batch_size": _BATCH,
        "train_data": "dataset_name",
        "train_file": "dataset_name",
        "train_split": "dataset_train_split",
        "use_4bit": "quantize_mode=4bit|",
        "use_8bit": "quantize_mode=8bit|",
        "use_lora": "method=lora|full",
        "use_qlora": "method=lora|full; on the 4-bit base that is the default",
        "valid_file": "eval_split",
        "validation_file": "eval_split",
        "validation_split": "eval_split; a fraction, a file, or split:NAME",
        "wandb": "report_to=wandb|none",
        "warmup": "warmup_steps",
        "wd": "weight_decay",
    },
    "Axolotl": {
        "auto_resume_from_checkpoints": "resume=auto|; as the flag --resume auto with --output_dir",
        "base_model": "model_name_or_path",
        "base_model_config": "; the model's own configuration is read",
        "chat_template": "template",
        "cosine_min_lr_ratio": _MIN_LR,
        "curriculum_sampling": "train_sampling_strategy=sequential|random",
        "cut_cross_entropy": "; the loss is always computed in pieces, without all logits",
        "dataset_prepared_path": "cache_dir",
        "dataset_processes": "dataset_num_proc",
        "datasets": "dataset_name",
        "early_stopping_patience": "early_stopping",
        "eval_sample_packing": "; evaluation packs as --packing says",
        "eval_table_size": "generate_samples",
        "evals_per_epoch": "eval_steps=0.1" + _SHARE,
        "excess_length_strategy": "overlong",
        "flash_attention": _ATTENTION,
        "fsdp_final_state_dict_type": _REPLICA,
        "gptq": "; of checkpoints that are quantized already, those of bitsandbytes are read",
        "is_falcon_derived_model": "; the model's layout says so",
        "liger_cross_entropy": _KERNELS,
        "liger_fused_linear_cross_entropy": _KERNELS,
        "liger_layer_norm": _KERNELS,
        "liger_rms_norm": _KERNELS,
        "liger_rope": _KERNELS,
        "lora_fan_in_fan_out": "; Falcon has no such layers",
        "lora_mlp_kernel": _KERNELS,
        "lora_model_dir": "adapter",
        "lora_modules_to_save": _NO_MODULES,
        "lora_o_kernel": _KERNELS,
        "lora_qkv_kernel": _KERNELS,
        "lora_target_linear": "; LoRA goes on all linears of every block by itself",
        "loraplus_lr_ratio": "; LoRA+ is not supported: one learning rate holds for all",
        "lr_scheduler": "lr_scheduler_type",
        "model_type": "; the model's own configuration says so",
        "noisy_embedding_alpha": "neftune_noise_alpha",
        "pad_to_sequence_len": "padding=max_length|longest; without --packing",
        "peft_use_dora": "use_dora",
        "peft_use_rslora": "use_rslora",
        "plugins": "; there are none",
        "relora_steps": "; ReLoRA is not supported",
        "revision_of_model": "model_revision",
        "rl": _NO_DPO,
        "roles_to_train": "train_on=answers",
        "s2_attention": _ATTENTION,
        "sample_packing": "packing",
        "saves_per_epoch": "save_steps=0.1" + _SHARE,
        "sdp_attention": _ATTENTION,
        "sequence_len": "max_length",
        "shuffle_merged_datasets": "train_sampling_strategy=random|sequential",
        "special_tokens": _TOKENS,
        "strict": "; what does not fit is always an error",
        "test_datasets": "eval_split",
        "tokenizer_config": "tokenizer_name_or_path",
        "tokenizer_type": "; the tokenizer's own files say so",
        "tokens": "new_tokens",
        "train_on_inputs": "train_on=all|answers",
        "unfrozen_parameters": "; --method says what is trained",
        "val_set_size": "eval_split; a fraction; 0: leave it out",
        "wandb_log_model": _WANDB.format("LOG_MODEL"),
        "wandb_name": "run_name",
        "wandb_run_id": _WANDB.format("RUN_ID"),
        "wandb_watch": _WANDB.format("WATCH"),
        "xformers_attention": _ATTENTION,
    },
    "Axolotl and LitGPT": {
        "micro_batch_size": _BATCH,
    },
    "LLaMA-Factory": {
        "adapter_name_or_path": "adapter",
        "add_tokens": "new_tokens",
        "additional_target": _NO_MODULES,
        "cutoff_len": "max_length",
        "dataset_dir": "; --dataset_name takes files and folders by their paths",
        "disable_gradient_checkpointing": "checkpointing=none|auto",
        "do_sample": "; falcon-qlora generate draws where --temperature is above 0",
        "enable_liger_kernel": _KERNELS,
        "export_dir": _MERGE,
        "export_size": _MERGE,
        "finetuning_type": "method",
        "flash_attn": _ATTENTION,
        "freeze_trainable_layers": "; training some layers alone is not supported: --method lora, or full",
        "interleave_probs": "dataset_weights",
        "lora_target": "lora_target_modules",
        "mask_history": "; a row's own marks say which of its answers are trained on",
        "max_samples": "max_rows",
        "media_dir": "; only text is read",
        "mix_strategy": "; see --dataset_weights",
        "neat_packing": "packing",
        "new_special_tokens": "new_tokens",
        "overwrite_cache": "; the cache knows when rows or settings change",
        "overwrite_output_dir": "overwrite",
        "pissa_init": "; PiSSA is not supported",
        "plot_loss": "; a run always draws loss.png",
        "preprocessing_num_workers": "dataset_num_proc",
        "pure_bf16": "compute_dtype=bf16|",
        "quantization_bit": "quantize_mode",
        "quantization_method": "; bases are stored in NF4 or LLM.int8() of bitsandbytes",
        "quantization_type": "; 4bit is always NF4",
        "resize_vocab": "; --new_tokens makes room for what it adds",
        "rope_scaling": "; the model's own positions are used",
        "shift_attn": _ATTENTION,
        "stage": _ALWAYS_SFT,
        "tokenized_path": "cache_dir",
        "train_on_prompt": "train_on=all|answers",
        "upcast_layernorm": "norms_in_float32",
        "use_unsloth": _KERNELS,
        "val_size": "eval_split; a fraction; 0: leave it out",
    },
    "LitGPT": {
        "access_token": "hub_token",
        "eval.interval": "eval_steps",
        "logger_name": "report_to",
        "lora_head": "lora_target_modules=lm_head|",
        "lora_key": "lora_slices=key|",
        "lora_mlp": "lora_target_modules=dense_h_to_4h dense_4h_to_h|",
        "lora_projection": "lora_target_modules=dense|",
        "lora_query": "lora_slices=query|",
        "lora_value": "lora_slices=value|",
        "lr_warmup_steps": "warmup_steps",
        "mask_prompt": "train_on=answers|all",
        "min_lr": _MIN_LR,
        "precision": "compute_dtype",
        "prompt_style": "template",
        "val_split_fraction": "eval_split",
    },
    "PEFT": {
        "init_lora_weights": "; LoRA begins at zero",
        "layers_to_transform": "; LoRA goes on every block",
        "lora_bias": "; LoRA has no biases; see --method adapter_v2",
        "modules_to_save": _NO_MODULES,
        "task_type": "; it is always a causal language model",
    },
    "TRL": {
        "attn_implementation": _ATTENTION,
        "bnb_4bit_compute_dtype": "compute_dtype",
        "bnb_4bit_quant_type": "; 4bit is always NF4",
        "bnb_4bit_use_double_quant": "double_quantization",
        "dataset_streaming": "streaming",
        "dataset_test_split": "eval_split=split:{}",
        "evaluation_strategy": "eval_strategy",
        "lora_modules_to_save": _NO_MODULES,
        "lora_task_type": "; it is always a causal language model",
        "per_gpu_train_batch_size": _BATCH,
        "save_safetensors": _SAVED,
        "torch_dtype": "compute_dtype",
        "use_bnb_nested_quant": "double_quantization",
    },
    "Unsloth": {
        "full_finetuning": "method=full|",
        "hub_path": "hub_model_id",
        "loftq_config": "; LoftQ is not supported: the base is quantized as it is",
        "push_model": "push_to_hub",
        "random_state": "seed",
        "save_method": _MERGE,
        "save_model": "; the adapter is always saved",
        "save_path": "output_dir",
        "use_gradient_checkpointing": "checkpointing=full|none",
    },
}

# Setting → value elsewhere → the value here, with a remark.
VALUES: dict[str, dict[str, str]] = {
    "adapter": dict.fromkeys(
        ("lora", "qlora"),
        "; --adapter names a trained one to begin with, --method what is trained",
    ),
    "bf16": {"auto": "; --compute_dtype is auto where nothing else is given"},
    "checkpointing": {"true": "full", "false": "none", "unsloth": "offload"},
    "compute_dtype": {
        **dict.fromkeys(("bfloat16", "bf16-true", "bf16-mixed", "torch.bfloat16"), "bf16"),
        **dict.fromkeys(("float16", "16", "16-true", "16-mixed", "half", "torch.float16"), "fp16"),
        **dict.fromkeys(("float32", "32", "32-true", "float", "torch.float32"), "fp32"),
    },
    "dataset_format": {
        **dict.fromkeys(("messages", "openai", "chatml", "chat_template"), "chat"),
        **dict.fromkeys(("conversations", "vicuna"), "sharegpt"),
        **dict.fromkeys(("completion", "pretrain", "raw", "txt"), "text"),
        **dict.fromkeys(("instruct", "instruction"), "alpaca"),
    },
    "device": dict.fromkeys(("cuda", "gpu", "cuda:0"), "auto"),
    "gpus": dict.fromkeys(("auto", "all"), "; every visible GPU is used where nothing else is given"),
    "lora_target_modules": {"all": "all-linear"},
    "method": {
        "adapter-v2": "adapter_v2",
        "dora": "lora; with --use_dora",
        "fft": "full",
        "finetune": "full",
        "freeze": "; training some layers alone is not supported: --method lora, or full",
        "full_finetuning": "full",
        "ia3": "; IA3 is not supported: --method lora, adapter or adapter_v2",
        "llama_adapter": "adapter",
        "none": "full",
        "prefix": "adapter",
        "qlora": "lora; with -q 4bit, the default: QLoRA is LoRA on a quantized base",
        "rslora": "lora; with --use_rslora",
        "sft": "lora" + _ALWAYS_SFT,
    },
    "optim": {
        **dict.fromkeys(("adam", "adamw", "adamw_hf", "torch.optim.adamw"), "adamw_torch_fused"),
        "adamw8bit": "adamw_8bit",
        "paged_adamw": "paged_adamw_32bit",
    },
    "quantize_mode": {
        **dict.fromkeys(("4", "4-bit", "int4", "nf4", "fp4", "bnb.nf4", "bnb.nf4-dq", "qlora"), "4bit"),
        **dict.fromkeys(("8", "8-bit", "int8", "bnb.int8", "llm.int8"), "8bit"),
        **dict.fromkeys(("16", "bf16", "fp16", "none", "no", "false", "32", "32bit"), "16bit"),
        **dict.fromkeys(("2", "2bit", "3", "3bit", "6bit"), "4bit; the smallest there is"),
    },
    "train_on": {
        **dict.fromkeys(("assistant", "completion", "completions", "outputs", "responses"), "answers"),
        **dict.fromkeys(("inputs", "everything", "text", "both"), "all"),
    },
}

COMMANDS = {
    "benchmark": "bench",
    "chat": "generate --chat",
    "convert": "merge",
    "download": "prepare",
    "evaluate": "eval",
    "export": "merge",
    "finetune": "train",
    "finetune_lora": "train --method lora",
    "fit": "train",
    "infer": "generate",
    "inference": "generate",
    "info": "inspect",
    "lm_eval": "eval --tasks",
    "merge_lora": "merge",
    "predict": "generate",
    "preprocess": "prepare",
    "run": "train",
    "sft": "train",
    "test": "eval",
    "tokenize": "prepare",
    "validate": "inspect",
}


def plain(name: str) -> str:
    """A name reduced to what its spellings share: ``--batchSize`` and ``batch_size`` are the same."""
    return re.sub(r"[-_]", "", name).lower()


NAMES = {name: (tool, told) for tool, names in _BY_TOOL.items() for name, told in names.items()}
_BY_PLAIN = {plain(name): name for name in NAMES}


def answer(name: str, value: Any, write: Callable[[str, str], str]) -> str | None:
    """The tool that has an unknown name, and what to give instead, for a message; None if no tool has it.

    Args:
        name: without leading dashes; it may have a section (``train.micro_batch_size``).
        value: the one given to it; None if it had none.
        write: writes a setting and its value ("" for any) as a flag or as a line of a file.
    """
    known = _BY_PLAIN.get(plain(name)) or _BY_PLAIN.get(plain(name.rpartition(".")[2]))
    if known is None:
        return None
    tool, told = NAMES[known]
    target, _, note = told.partition("; ")
    setting, _, pattern = target.partition("=")
    shown = _on_one_line(value)
    here, _, more = VALUES.get(setting, {}).get(shown.lower(), shown).partition("; ")
    if "|" in pattern:
        here = pattern.split("|")[shown.lower() in ("false", "no", "0", "none", "off")]
        setting = setting if here else ""
    elif pattern:
        here = pattern.replace("{}", here)
    elif shown and not here:
        setting = ""
    advice = f"give {write(setting, here)}" if setting else "leave it out"
    remarks = "; ".join(part for part in (more, note) if part)
    return (f" ({tool}'s)" if tool else "") + f": {advice}" + (f" ({remarks})" if remarks else "")


def targets() -> dict[str, str]:
    """Name elsewhere → setting here."""
    found = ((name, told.partition("; ")[0].partition("=")[0]) for name, (_, told) in NAMES.items())
    return {name: setting for name, setting in found if setting}


def of_value(setting: str, value: Any) -> str | None:
    """The value here for one known elsewhere, to follow it in a message; None if it is not known."""
    known = VALUES.get(setting, {}).get(str(value).lower())
    if known is None:
        return None
    here, _, note = known.partition("; ")
    return (f"here that is {here}" if here else "leave it out") + (f" ({note})" if note else "")


def _on_one_line(value: Any) -> str:
    """A value as it can be given here; "" if it cannot, or is too long to be repeated."""
    if isinstance(value, bool):
        return str(value).lower()
    parts = value if isinstance(value, list) else [] if value is None else [value]
    # Axolotl's datasets are mappings.
    texts = [str(each.get("path", "")) if isinstance(each, dict) else str(each) for each in parts]
    shown = " ".join(texts)
    return shown if shown.isprintable() and len(shown) <= 80 else ""
