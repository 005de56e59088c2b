"""What a finished run comes down to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished run in a few numbers: `summary.json`.

    Attributes:
        steps: Optimizer steps done, over all resumptions.
        first_loss: Training loss of the first log step (mean over target tokens).
        final_loss: Training loss of the last log step.
        train_seconds: Time in the steps themselves: without start, saves, evaluation and end.
        tokens_per_second: Real tokens (no padding) a second of the steps, over all processes.
        samples_per_second_512: The same in samples of 512 positions.
        peak_memory_gib: Largest memory allocated on one device, GiB.
        trainable_parameters: Parameters that were trained.
        total_parameters: All parameters, the quantized ones counted unpacked.
        quantized_linears: Linear layers whose weights are quantized.
        world_size: Processes that trained together.
        best_eval_loss: Lowest held-out loss, where there was an evaluation; of the best checkpoint, where the
            adapter is that one's.
        best_step: The step of `best_eval_loss`.
        bad_steps: Steps that were skipped, as their loss or gradient was not finite.
        micro_batch_parts: In how many parts micro batches were split in the end, as memory had run out.
        tokens: Real tokens trained on, over all passes and resumptions.
        samples: Documents trained on, likewise; None of a stream, which is not counted.
        total_peak_memory_gib: The processes' peaks together.
        predicted_peak_memory_gib: What `peak_memory_gib` was expected to be, on a GPU.
        reduction_shares: Of each process's time in training, what it spent adding up gradients, waiting for
            the slowest included (which has the least), since the run was last started; None of one process.
        wall_seconds: What the commands took that made the run, each from its start, until this was written.
        wall_tokens_per_second: Real tokens a second of these.
        step_share: `train_seconds` of `wall_seconds`, 0 to 1.
        start_seconds: Of `wall_seconds`: before the first step.
        save_seconds: Of `wall_seconds`: in which the steps waited for checkpoints.
        evaluation_seconds: Of `wall_seconds`: of evaluations, sample answers included.
        end_seconds: Of `wall_seconds`: after the last step.
        start_phases: Phase of the last start → its seconds.
        refused_by_peft: Linears with LoRA for which plain PEFT does not open the adapter.
        adapter: Folder of the adapter that the run began from, where it did.
        adapter_sha256: Of that one's weights.
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
    micro_batch_parts: int = 1
    tokens: int | None = None
    samples: int | None = None
    total_peak_memory_gib: float | None = None
    predicted_peak_memory_gib: float | None = None
    reduction_shares: list[float] | None = None
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
