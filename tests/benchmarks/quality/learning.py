"""Fine-tuning with the stock path and with the fast one: the same seed, the same batches, the same loss?"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from falcon_qlora.data.files import iterate_rows
from falcon_qlora.data.formats import load_template
from falcon_qlora.data.packing import MicroBatch, Plan, collate
from falcon_qlora.data.rendering import render
from falcon_qlora.data.tokens import Document, Encoder, Status
from falcon_qlora.models.fast_path import remove_fast_path
from falcon_qlora.models.tokenizer import load_tokenizer
from falcon_qlora.step.loss import sum_of_losses
from tests.benchmarks.quality.mutants import MUTANTS
from tests.benchmarks.quality.variants import PathName, Variant, autocast, build

_MAX_LENGTH = 512
_WARM_UP_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How to fine-tune.

    Attributes:
        epochs: passes over the training rows.
        batch_tokens: tokens of a step, packed.
        learning_rate: the highest; it warms up and then falls to zero in a straight line.
        clip: largest norm of the gradient.
    """

    epochs: int = 2
    batch_tokens: int = 16_384
    learning_rate: float = 1e-3
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokenized rows, the held-out ones apart."""

    training: list[Document]
    evaluation: list[Document]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One fine-tuning run: `base` is the name in the report, `folder` where the model lies."""

    base: str
    folder: str
    variant: Variant
    path: PathName
    seed: int
    mutant: str | None = None
    repeat: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of a job. Losses are in nats a target token of the held-out rows.

    Attributes:
        job: what was run.
        untrained: loss before training.
        own: loss after it, through the path that trained.
        by_stock: loss of the same adapter through the stock path, as whoever uses it will run it.
        steps: optimizer steps.
        seconds: for all of it, loading included.
    """

    job: Job
    untrained: float
    own: float
    by_stock: float
    steps: int
    seconds: float


def read_rows(data: Path, tokenizer_folder: Path, *, held_out: int, limit: int | None = None) -> Rows:
    """Tokenize rows of Alpaca columns; the same `held_out` ones are held out always."""
    tokenizer = load_tokenizer(str(tokenizer_folder))
    template = load_template("auto", "alpaca", tokenizer)
    encoder = Encoder(
        tokenizer=tokenizer,
        train_on="answers",
        append_end_token=True,
        overlong="drop",
        max_length=_MAX_LENGTH,
    )
    rows = [row for _, row in iterate_rows(data)][:limit]
    found = encoder.documents([render(row, "alpaca", template) for row in rows])
    documents = [document for of_row in found for document in of_row if document.status == Status.KEPT]
    order = np.random.default_rng(0).permutation(len(documents))
    shuffled = [documents[index] for index in order]
    return Rows(training=shuffled[held_out:], evaluation=shuffled[:held_out])


def batches(documents: Sequence[Document], tokens: int, epochs: int, seed: int | None) -> list[MicroBatch]:
    """Packed batches of up to `tokens` tokens in the seed's order, or in the given order without one."""
    plan = Plan(
        lengths=np.array([len(document.input_ids) for document in documents]),
        fingerprint="0",
        seed=seed or 0,
        global_batch=1,
        max_length=tokens,
        order="sequential" if seed is None else "random",
    )
    found = []
    for step in range(plan.steps(epochs)):
        chosen = [documents[index] for index in plan.documents(step)]
        found.append(collate([d.input_ids for d in chosen], [d.mask for d in chosen]))
    return found


def fine_tune(job: Job, rows: Rows, schedule: Schedule, device: torch.device) -> Run:
    """Train an adapter and evaluate it.

    Raises:
        NotBuilt: if there is no such path.
    """
    started = time.perf_counter()
    model = build(job.variant, job.folder, device, job.path, seed=job.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0, weight_decay=0, fused=device.type == "cuda")
    training = batches(rows.training, schedule.batch_tokens, schedule.epochs, job.seed)
    evaluation = [b.to(device) for b in batches(rows.evaluation, schedule.batch_tokens, 1, None)]
    with MUTANTS[job.mutant](model) if job.mutant else nullcontext():
        before = evaluate(model, job.variant, evaluation)
        for step, batch in enumerate(training):
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * _factor(step, len(training))
            batch = batch.to(device)
            with autocast(job.variant, device):
                loss = sum_of_losses(model, batch) / len(batch.targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        own = evaluate(model, job.variant, evaluation)
    remove_fast_path(model)
    return Run(
        job=job,
        untrained=before,
        own=own,
        by_stock=evaluate(model, job.variant, evaluation),
        steps=len(training),
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def evaluate(model: Any, variant: Variant, evaluation: list[MicroBatch]) -> float:
    """Mean loss in nats a target token."""
    model.eval()
    device = evaluation[0].input_ids.device
    with autocast(variant, device):
        total = sum(sum_of_losses(model, batch).double() for batch in evaluation)
    model.train()
    return float(total) / sum(len(batch.targets) for batch in evaluation)


def _factor(step: int, steps: int) -> float:
    warm_up = max(1, math.ceil(_WARM_UP_SHARE * steps))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
