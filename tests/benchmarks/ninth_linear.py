"""Whether LoRA on Falcon-H1's ninth linear, out_proj, pays: held-out losses with it and without.

    python -m tests.benchmarks.ninth_linear --out FOLDER

On a CPU, in minutes. A small Falcon-H1 is trained on generated English and fine-tuned on two things: the
packaged rows, whose answers count, and documentation, of which every token counts. Prints Markdown, which
`ninth_linear.md` keeps. PEFT takes eight of the nine linears; eight of a rank more have as many parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from falcon_qlora.data import sample_data
from falcon_qlora.data.packing import MicroBatch, collate
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts.falcon_h1 import FalconH1
from falcon_qlora.models.load import load_model
from falcon_qlora.models.tiny import held_out_documents, tiny_path
from falcon_qlora.models.tokenizer import load_tokenizer
from falcon_qlora.step.loss import sum_of_losses
from tests.benchmarks.quality.base import configuration, train_base
from tests.benchmarks.quality.learning import batches, evaluate, read_rows
from tests.benchmarks.quality.variants import VARIANTS
from tests.layouts import attach_lora
from tests.tiny_model.english import write_documents
from tests.tiny_model.train import Settings

HIDDEN, BLOCKS = 64, 2
EIGHT = [name for name in FalconH1.linears if name not in FalconH1.not_for_peft]
NINE = "nine, r 10"
ARMS: dict[str, tuple[list[str], int]] = {
    NINE: ([*FalconH1.linears], 10),
    "eight, r 10": (EIGHT, 10),
    "eight, r 11": (EIGHT, 11),
}
CPU = torch.device("cpu")
Data = tuple[list[MicroBatch], list[MicroBatch]]  # to train on, held out
Task = Callable[[int], Data]  # of a seed, which orders the former


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the base; one there is taken")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--documents", type=int, default=3000, help="of generated English for the base")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    base = arguments.out / "base"
    if not base.exists():
        _train(arguments.out, arguments.documents)
    for name, task in (("rows", _rows()), ("text", _text())):
        started = time.monotonic()
        print(f"\n**{name}**\n")
        print("| LoRA on | parameters | held-out loss: mean (standard deviation) | nine less this |")
        print("|---|---|---|---|")
        found: dict[str, list[float]] = {}
        for arm, (linears, rank) in ARMS.items():
            runs = [
                _run(base, task(seed), linears, rank, seed, arguments.learning_rate)
                for seed in range(arguments.seeds)
            ]
            losses = found[arm] = [loss for _, loss in runs]
            count = runs[0][0]
            differences = [ours - loss for ours, loss in zip(found[NINE], losses, strict=True)]
            spread = f"{statistics.mean(losses):.4f} ({statistics.stdev(losses):.4f})"
            less = _mean_and_error(differences) if arm != NINE else ""
            print(f"| {arm} | {count:,} | {spread} | {less} |", flush=True)
        _, untrained = _run(base, ([], task(0)[1]), *ARMS[NINE], 0, arguments.learning_rate)
        print(f"\nUntrained: {untrained:.4f}. {time.monotonic() - started:.0f} s.")


def _train(out: Path, documents: int) -> None:
    tokenizer = load_tokenizer("tiny")
    texts = list(islice(write_documents(seed=0), documents))
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "tokens.npy", np.concatenate([[*ids, 0] for ids in tokenizer(texts)["input_ids"]]))
    settings = Settings(
        minutes=5, epochs=1, batch_tokens=512, learning_rate=1e-2, compile_model=False, seed=0
    )
    config = configuration("falcon-h1", len(tokenizer), HIDDEN, BLOCKS)
    train_base(out / "tokens.npy", out / "base", config, settings, CPU)


def _rows() -> Task:
    rows = read_rows(sample_data.path(), tiny_path(), held_out=100, limit=500)
    held_out = batches(rows.evaluation, 2048, 1, None)
    return lambda seed: (batches(rows.training, 512, 1, seed), held_out)


def _text() -> Task:
    tokenizer = load_tokenizer("tiny")
    texts = held_out_documents()["documentation"]
    ids = np.concatenate([np.array(tokenizer(text, verbose=False)["input_ids"]) for text in texts])
    pieces = [ids[start : start + 128] for start in range(0, len(ids) - 128, 128)]
    held_out, training = pieces[::4], [piece for at, piece in enumerate(pieces) if at % 4]

    def data(seed: int) -> Data:
        order = np.random.default_rng(seed).permutation(3 * len(training)) % len(training)
        return list(_packed([training[at] for at in order], 4)), list(_packed(held_out, 16))

    return data


def _packed(pieces: list[np.ndarray], size: int) -> Iterator[MicroBatch]:
    for start in range(0, len(pieces), size):
        some = pieces[start : start + size]
        yield collate(some, [np.ones(len(piece)) for piece in some])


def _run(
    base: Path, data: Data, linears: list[str], rank: int, seed: int, learning_rate: float
) -> tuple[int, float]:
    """Trainable parameters, and the held-out loss after training."""
    training, held_out = data
    model: Any = load_model(str(base), quantize_mode="4bit", device="cpu", compute_dtype="fp32")
    model = attach_lora(model, r=rank, alpha=2 * rank, seed=seed, target_modules=linears)
    enable_packing(model)
    apply_fast_path(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for step, batch in enumerate(training):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 8) * (1 - step / len(training))
        (sum_of_losses(model, batch) / len(batch.targets)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    loss = evaluate(model, VARIANTS["4bit-fp32"], held_out)
    return sum(parameter.numel() for parameter in parameters), loss


def _mean_and_error(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.4f} ± {error:.4f}"


if __name__ == "__main__":
    main()
