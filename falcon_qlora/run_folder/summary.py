"""The summary of a finished run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished run in a few numbers: `summary.json`.

    Attributes:
        steps: Optimizer steps done, over all resumptions.
        first_loss: Training loss of the first log step (mean over target tokens).
        final_loss: Training loss of the last log step.
        train_seconds: Seconds in the steps themselves, without start, saves, evaluation and end.
        tokens_per_second: Real tokens (no padding) a second of the steps, over all processes.
        samples_per_second_512: Computed positions (padding included) a second, in samples of 512.
        peak_memory_gib: Largest memory a process reserved on its GPU, or held resident without one, GiB.
        trainable_parameters: Parameters that were trained.
        total_parameters: All parameters, the quantized ones counted unpacked.
        quantized_linears: Linear layers whose weights are quantized.
        world_size: Processes that trained together.
        best_eval_loss: Lowest held-out loss, if there was an evaluation; the best checkpoint's, if the
            adapter is from there.
        best_step: The step of `best_eval_loss`.
        bad_steps: Steps that were skipped for a non-finite loss or gradient.
        overflowed_steps: Steps that the scaler of fp16 skipped, as a gradient overflowed at its scale.
        micro_batch_parts: Parts that each micro-batch was split into at the end; more than 1 after OOM.
        micro_batch_tokens: Tokens that a micro-batch had at most, before it was split, or of a process's even
            part of a step if that is less; None if rows were padded.
        micro_batches: Micro-batches of a full step on each process.
        micro_batch_reason: Why so many: as the start says it.
        checkpointing: What blocks recomputed in the backward pass, such as ``full in 6 of 32, else none``.
        tokens: Real tokens trained on, over all passes and resumptions.
        samples: Documents trained on, likewise; None for a stream, which is not counted.
        total_peak_memory_gib: Sum of the processes' peaks.
        predicted_peak_memory_gib: What `peak_memory_gib` was predicted to be; None on the CPU.
        card_gib: All that the first process's GPU held after the last step, other programs' included, as
            nvidia-smi counts it; None on the CPU.
        estimated_card_gib: What `falcon-qlora estimate` says of it.
        estimated_tokens_per_second: What it says of `tokens_per_second`; None for a GPU unknown to it.
        reduction_shares: Share of each process's training time in the gradient all-reduce, since the last
            start. It includes the wait for the slowest, which has the smallest share. None for one process.
        network_share: Share of a step in the all-reduce between nodes: that of the slowest process, which
            waits for no other. None on one node.
        wall_seconds: Seconds of all commands of the run, each from its start, until this was written.
        wall_tokens_per_second: Real tokens a second of `wall_seconds`.
        step_share: `train_seconds` of `wall_seconds`, 0 to 1.
        start_seconds: Of `wall_seconds`, before the first step, and in it while the packing was tried.
        save_seconds: Of `wall_seconds`, while the steps waited for checkpoints.
        evaluation_seconds: Of `wall_seconds`, in evaluations, sample answers included.
        end_seconds: Of `wall_seconds`, after the last step.
        start_phases: Phase of the last start → its seconds.
        refused_by_peft: Linears with LoRA for which plain PEFT does not open the adapter.
        adapter: Folder of the adapter that the run began from, if any.
        adapter_sha256: Of that adapter's weights.
        checks: What was proved about the run, by check: see `training.checks`. None in older summaries.
    """

    steps: int
    first_loss: float | None
    final_loss: float | None
    train_seconds: float
    tokens_per_second: float
    samples_per_second_512: float
    peak_memory_gib: float
    trainable_parameters: int
    total_parameters: int
    quantized_linears: int
    world_size: int
    best_eval_loss: float | None = None
    best_step: int | None = None
    bad_steps: int = 0
    overflowed_steps: int = 0
    micro_batch_parts: int = 1
    micro_batch_tokens: int | None = None
    micro_batches: int | None = None
    micro_batch_reason: str | None = None
    checkpointing: str | None = None
    tokens: int | None = None
    samples: int | None = None
    total_peak_memory_gib: float | None = None
    predicted_peak_memory_gib: float | None = None
    card_gib: float | None = None
    estimated_card_gib: float | None = None
    estimated_tokens_per_second: float | None = None
    reduction_shares: list[float] | None = None
    network_share: float | None = None
    wall_seconds: float | None = None
    wall_tokens_per_second: float | None = None
    step_share: float | None = None
    start_seconds: float | None = None
    save_seconds: float | None = None
    evaluation_seconds: float | None = None
    end_seconds: float | None = None
    start_phases: dict[str, float] | None = None
    refused_by_peft: list[str] | None = None
    adapter: str | None = None
    adapter_sha256: str | None = None
    checks: dict[str, dict[str, Any]] | None = None
