"""Loss, perplexity and divergence on text: of a loaded model, or of a model's folder a block at a time.

Shape legend: T tokens of a batch laid end to end, N positions that are measured, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from falcon_qlora.data.batches import DocumentReader, filled_up
from falcon_qlora.data.packing import MicroBatch, deal
from falcon_qlora.models.checkpoints import parameter_reader, read_folder_config
from falcon_qlora.models.forward import enable_packing, final_norm, run_block, run_blocks
from falcon_qlora.models.layouts import causal_lm_in, layout_of
from falcon_qlora.models.load import empty_model
from falcon_qlora.models.packed_attention import Sequences
from falcon_qlora.models.scaled import ScaleAndBias, scale_and_bias_of
from falcon_qlora.models.sharded import needs_all_processes
from falcon_qlora.step.loss import evaluated

_CHUNK = 1024  # positions whose logits exist at a time


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What is needed to compute a model's predictions at every measured position.

    Attributes:
        hidden: ``[N, H]``, after the final norm.
        head: ``[V, H]``.
        vectors: scale and shift of the head's output, where a method trained them.
        scale: factor of the model's logits.
        targets: int64 ``[N]``, the tokens that came.
        answers: bool ``[N]``, whether the token is one that training would count.
    """

    hidden: Tensor
    head: Tensor
    vectors: ScaleAndBias | None
    scale: float
    targets: Tensor
    answers: Tensor


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out documents and how a run goes through them.

    Args:
        reader: of the held-out corpus, packed.
        lengths: ``[documents]``, tokens.
        target_tokens: over the whole corpus.
        micro_batch: sequences of `max_length` in one forward.
        max_length: tokens.
    """

    reader: DocumentReader
    lengths: np.ndarray
    target_tokens: int
    micro_batch: int
    max_length: int

    def loss(
        self, model: nn.Module, accelerator: Any, *, halvings: int, at: Callable[[int, str], None]
    ) -> float:
        """The mean over the target tokens, over all processes. No logits are kept.

        Args:
            model: that is trained; it is left as it was.
            accelerator: Accelerate's, which knows the processes.
            halvings: how often every micro-batch is halved from the start, after OOM.
            at: gets the phase and what is being done; see `Watchdog.at`.
        """
        was_training, sharded = model.training, needs_all_processes(model)
        model.eval()
        total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
        for batch in self._share(accelerator.process_index, accelerator.num_processes, even=sharded):
            at(4, "evaluating")
            total += evaluated(
                model, batch, device=accelerator.device, halvings=halvings, can_retry=not sharded
            )
        at(5, "adding up the evaluation")
        model.train(was_training)
        return float(accelerator.reduce(total)) / self.target_tokens

    def _share(self, process: int, processes: int, *, even: bool) -> Iterator[MicroBatch]:
        """One process's micro-batches, on the host; `even`: as many as any has, some without targets."""
        dealt = deal(
            np.arange(len(self.lengths)),
            self.lengths,
            processes=processes,
            micro_batch=self.micro_batch,
            max_length=self.max_length,
        )
        parts = filled_up(dealt[process], max(map(len, dealt)) if even else 0)
        return map(self.reader.micro_batch, parts)


def batches_of(corpus: Any, *, max_tokens: int, most_tokens: int | None = None) -> list[MicroBatch]:
    """The documents of a `Corpus` in their order, packed into batches.

    Args:
        corpus: tokenized documents.
        max_tokens: in one batch; a longer document is a batch of its own.
        most_tokens: stop before there are more than this; at least one document is taken.
    """
    reader = DocumentReader(corpus.dataset, padding=None, max_length=max_tokens, padding_id=0)
    lengths = corpus.lengths
    if most_tokens is not None:
        lengths = lengths[: max(int(np.searchsorted(np.cumsum(lengths), most_tokens, side="right")), 1)]
    batches: list[MicroBatch] = []
    start = tokens = 0
    for index, length in enumerate(lengths):
        if index > start and tokens + length > max_tokens:
            batches.append(reader.micro_batch(np.arange(start, index)))
            start, tokens = index, 0
        tokens += int(length)
    return [*batches, reader.micro_batch(np.arange(start, len(lengths)))]


@torch.no_grad()
def predictions(model: nn.Module, batches: Sequence[MicroBatch], *, answers_only: bool) -> Predictions:
    """Run a loaded model on batches.

    Args:
        model: as it is or inside PEFT's wrapper; packing is enabled on it.
        batches: from `batches_of`, on the host.
        answers_only: measure only what training would count; else every token but each document's first.
    """
    enable_packing(model)
    falcon = causal_lm_in(model)
    head, norm = falcon.get_output_embeddings(), final_norm(falcon.base_model)
    weight = head.weight  # in PEFT's wrapper, a copy that includes the trained rows
    device = weight.device
    states = (
        run_blocks(
            falcon.base_model, batch.input_ids.to(device), Sequences.from_lengths(batch.lengths, device)
        )
        for batch in batches
    )
    vectors, scale = scale_and_bias_of(head), layout_of(falcon.config).head_multiplier
    return _predictions(states, norm, weight, batches, answers_only, vectors=vectors, scale=scale)


@torch.no_grad()
def folder_predictions(
    folder: Path,
    batches: Sequence[MicroBatch],
    *,
    answers_only: bool,
    device: torch.device,
    dtype: torch.dtype,
    at_block: Callable[[int], None] = lambda index: None,
) -> Predictions:
    """Run the unquantized model of a folder, with one block in memory at a time.

    Args:
        folder: of a model.
        batches: as for `predictions`, which gives the same result.
        answers_only: as for `predictions`.
        device: where it is computed.
        dtype: in which it is computed.
        at_block: told the index of each block as it begins.
    """
    config = read_folder_config(folder)
    model = empty_model(config, dtype=dtype)
    enable_packing(model)
    read = parameter_reader(folder, config)
    layout, backbone = layout_of(config), model.base_model
    layout.fill_buffers(backbone, device)

    def fill(name: str) -> nn.Module:
        module, prefix = model.get_submodule(name), f"{name}."
        for name, _ in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            tensor = read(f"{prefix}{name}").to(device, dtype, copy=True)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        return module

    embedding = fill(f"{layout.backbone}.{layout.embedding}")
    packed = [Sequences.from_lengths(batch.lengths, device) for batch in batches]
    states = [layout.embed(embedding, batch.input_ids.to(device)) for batch in batches]
    if not config.tie_word_embeddings:
        embedding.to("meta")
    for index in range(config.num_hidden_layers):
        at_block(index)
        block = fill(f"{layout.backbone}.{layout.blocks}.{index}")
        for place, sequences in enumerate(packed):
            arguments = layout.block_arguments(backbone, states[place], sequences)
            states[place] = run_block(block, states[place], arguments)
        block.to("meta")
    norm = fill(f"{layout.backbone}.{layout.final_norm}")
    head: Any = (embedding if config.tie_word_embeddings else fill(layout.head)).weight
    return _predictions(states, norm, head, batches, answers_only, scale=layout.head_multiplier)


@torch.no_grad()
def token_losses(predicted: Predictions) -> Tensor:
    """Cross entropy of every measured position in nats: float32 ``[N]``, on the host."""
    losses = [
        nn.functional.cross_entropy(_logits(predicted, rows), predicted.targets[rows], reduction="none")
        for rows in _chunks(predicted)
    ]
    return torch.cat(losses).cpu() if losses else torch.empty(0)


@torch.no_grad()
def divergence(first: Predictions, second: Predictions) -> dict[str, float]:
    """How far `second` is from `first`.

    Returns:
        ``kl_divergence``, the mean Kullback-Leibler divergence in nats a token; ``largest_kl_divergence``, of
        a single position; ``same_top_token``, the share of positions with the same likeliest token.

    Raises:
        ValueError: if they are not of the same positions.
    """
    if not torch.equal(first.targets, second.targets):
        raise ValueError("the predictions are of different texts")
    kls, same = [], []
    for rows in _chunks(first):
        ours = nn.functional.log_softmax(_logits(first, rows), dim=-1)
        theirs = nn.functional.log_softmax(_logits(second, rows), dim=-1)
        kls.append((ours.exp() * (ours - theirs)).sum(-1).clamp(min=0))  # rounding goes below
        same.append(ours.argmax(-1) == theirs.argmax(-1))
    kl = torch.cat(kls).double()
    return {
        "kl_divergence": kl.mean().item(),
        "largest_kl_divergence": kl.max().item(),
        "same_top_token": torch.cat(same).double().mean().item(),
    }


def mean_loss(losses: Tensor) -> float:
    """The mean of `token_losses`, summed in float64; NaN if there are none."""
    return losses.double().mean().item() if len(losses) else math.nan


def _chunks(predicted: Predictions) -> Iterator[slice]:
    for start in range(0, len(predicted.targets), _CHUNK):
        yield slice(start, start + _CHUNK)


def _logits(predicted: Predictions, rows: slice) -> Tensor:
    logits = predicted.hidden[rows] @ predicted.head.T
    logits = (logits if predicted.vectors is None else predicted.vectors(logits)).float()
    return logits if predicted.scale == 1 else logits * predicted.scale


def _measured(batch: MicroBatch, answers_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Positions that are measured, the tokens that follow them, and which of those training would count."""
    counted = torch.zeros(batch.input_ids.shape[1], dtype=torch.bool)
    counted[batch.target_positions] = True
    if answers_only:
        return batch.target_positions, batch.targets, torch.ones_like(batch.targets, dtype=torch.bool)
    last = torch.zeros_like(counted)
    last[batch.cu_seqlens[1:].long() - 1] = True
    positions = torch.nonzero(~last).squeeze(1)
    return positions, batch.input_ids[0, positions + 1], counted[positions]


def _predictions(
    states: Iterable[Tensor],
    norm: nn.Module,
    head: Tensor,
    batches: Sequence[MicroBatch],
    answers_only: bool,
    *,
    vectors: ScaleAndBias | None = None,
    scale: float,
) -> Predictions:
    """Predictions from each batch's states ``[1, T, H]`` after the last block, batch by batch."""
    positions, targets, answers = zip(*(_measured(batch, answers_only) for batch in batches), strict=True)
    hidden = [
        norm(state[0].index_select(0, places.to(head.device)))
        for state, places in zip(states, positions, strict=True)
    ]
    return Predictions(
        hidden=torch.cat(hidden).to(head.dtype),
        head=head,
        vectors=vectors,
        scale=scale,
        targets=torch.cat(targets).to(head.device),
        answers=torch.cat(answers),
    )
