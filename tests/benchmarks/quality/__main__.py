"""The quality gate: speed that costs quality does not count.

    python -m tests.benchmarks.quality --data gsm8k_train.json --tokenizer FOLDER --out FOLDER

On one GPU, in minutes. Three parts: (a) block outputs and every gradient of the published shapes against
float32; (b) the same for whole trained models, with and without outliers; (c) fine-tuning with the stock path
and with the fast path. The stock path is PEFT's and bitsandbytes' modules under bfloat16 autocast. Mutants of
the fast path must be rejected. Writes ``quality.md`` and ``quality.json``; the exit status is 1 if a variant
that is on by default fails, or a mutant passes.

``--tiny`` does it in small, on a CPU, with the packaged model in place of one trained for the purpose.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from falcon_qlora.models.tiny import held_out_documents, tiny_path
from falcon_qlora.models.tiny_train import Settings
from falcon_qlora.models.tokenizer import load_tokenizer
from tests.benchmarks.quality.base import configuration, save_with_outliers, train_base
from tests.benchmarks.quality.distances import Comparison, compare
from tests.benchmarks.quality.learning import Job, Rows, Run, Schedule, fine_tune, read_rows
from tests.benchmarks.quality.report import Findings, decides, failures, stock_of, to_json, to_markdown
from tests.benchmarks.quality.variants import VARIANTS, NotBuilt, Variant, build
from tests.layouts import LAYOUTS, VOCABULARY

SHAPES = ("falcon-7b", "falcon-11b", "falcon-40b")
# Of LoRA's second matrices in part (b). Larger ones drown a model with outliers, which LoRA's first matrices
# see in full: its gradients are then noise in bfloat16, whoever computes them.
TRAINED_ADAPTER_STD = 0.01
LEARNING_MUTANTS = ("half the LoRA scale", "one block without its adapter")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What differs between the gate and its tiny form.

    Attributes:
        shapes: label → model of part (a).
        lengths: tokens of its documents.
        vocabulary: of its models.
        adapter_std: of LoRA's second matrices in part (a): LoRA adds a tenth or more to what a linear gives.
        variants: run where none are named.
        held_out: rows of the data to evaluate on.
        rows: of the data at most; all where None.
        schedule: of fine-tuning.
        workers: processes that fine-tune side by side; 0 for this one alone.
    """

    shapes: dict[str, str]
    lengths: tuple[int, ...]
    vocabulary: int
    adapter_std: float
    variants: tuple[str, ...]
    held_out: int
    rows: int | None
    schedule: Schedule = field(default_factory=Schedule)
    workers: int


FULL = Size(
    shapes={name: f"random:{name}?num_hidden_layers=2" for name in SHAPES},
    lengths=(700, 1, 512, 3, 387, 129, 300, 16),
    vocabulary=65_024,
    adapter_std=0.02,
    variants=("4bit", "8bit", "16bit", "4bit-fp8"),
    held_out=600,
    rows=None,
    workers=3,
)
TINY = Size(
    shapes={name: LAYOUTS[name] for name in SHAPES},
    lengths=(70, 1, 51, 3, 38, 12, 25),
    vocabulary=VOCABULARY,
    adapter_std=0.1,
    variants=tuple(VARIANTS),
    held_out=30,
    rows=80,
    schedule=Schedule(epochs=1, batch_tokens=1024),
    workers=0,
)


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.tiny and (arguments.data is None or arguments.tokenizer is None):
        parser.error("without --tiny it needs --data and --tokenizer")
    if arguments.data is None and "c" in arguments.parts:
        parser.error("part c needs --data")
    warnings.simplefilter("ignore", FutureWarning)  # of Transformers, about its own names
    size = TINY if arguments.tiny else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    findings = Findings(about=_about(device))
    variants = _buildable(arguments.variants or size.variants, device, findings)
    parts = set(arguments.parts)
    tokenizer = tiny_path() if arguments.tiny else arguments.tokenizer
    trains = bool(parts & {"b", "c"}) and not arguments.tiny and arguments.base is None
    rows = None
    if arguments.data is not None:
        rows = read_rows(arguments.data, tokenizer, held_out=size.held_out, limit=size.rows)
    pool = _pool(size.workers, rows, size.schedule) if rows and size.workers and "c" in parts else None
    text = _start_gathering(out, tokenizer, arguments.megabytes) if trains else None
    if "a" in parts:
        with _timed("(a) kernel", findings):
            documents = _random_documents(size, device)
            findings.kernel = _compare_all(variants, size.shapes, documents, size.adapter_std)
        _write(out, findings)
    if parts & {"b", "c"}:
        if text is not None:
            _train(out, tokenizer, arguments.seconds, device, text, findings)
        base = arguments.base or (tiny_path() if arguments.tiny else out / "base")
        save_with_outliers(base, out / "base-outliers")
        bases = {"plain": str(base), "outliers": str(out / "base-outliers")}
    if "b" in parts:
        with _timed("(b) model", findings):
            documents = _real_documents(rows, size, tokenizer, device)
            findings.model = _compare_all(variants, bases, documents, TRAINED_ADAPTER_STD)
        _write(out, findings)
    if "c" in parts and variants:
        with _timed("(c) learning", findings):
            assert rows is not None
            jobs = _jobs(bases, variants, arguments.seeds)
            findings.learning = _run(jobs, pool, rows, size.schedule, device)
    print(_write(out, findings), flush=True)
    return int(any(decides(name) for name in failures(findings)))


def _write(out: Path, findings: Findings) -> str:
    """After every part: what was found is not lost to a later fault."""
    report = to_markdown(findings)
    (out / "quality.md").write_text(report)
    (out / "quality.json").write_text(to_json(findings))
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.quality", description="Whether the fast path keeps the quality."
    )
    parser.add_argument("--data", type=Path, help="rows with Alpaca columns, GSM8K's")
    parser.add_argument("--tokenizer", type=Path, help="folder of Falcon's tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report and the models")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--parts", nargs="+", choices=("a", "b", "c"), default=["a", "b", "c"])
    parser.add_argument("--base", type=Path, help="folder of an earlier run's base, instead of training one")
    parser.add_argument("--seconds", type=float, default=150, help="to train the base for")
    parser.add_argument("--megabytes", type=float, default=280, help="of text to train it on")
    parser.add_argument("--tiny", action="store_true", help="in small, with the packaged model")
    return parser


def _about(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__}


@contextmanager
def _timed(what: str, findings: Findings) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the processes beside this one
    findings.about[f"{what}, seconds"] = round(time.perf_counter() - started, 1)
    print(f"- {what}: {time.perf_counter() - started:.0f} s", flush=True)


def _buildable(names: tuple[str, ...], device: torch.device, findings: Findings) -> list[Variant]:
    variants = []
    for name in names:
        try:
            build(VARIANTS[name], "tiny", device, "fast")
        except NotBuilt as error:
            findings.skipped[name] = str(error)
        else:
            variants.append(VARIANTS[name])
    return variants


def _compare_all(
    variants: list[Variant], models: dict[str, str], documents: dict[str, list[Tensor]], adapter_std: float
) -> list[Comparison]:
    found = []
    for label, name in models.items():
        for variant in variants:
            found.append(compare(variant, label, name, documents[label], adapter_std))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return found


def _random_documents(size: Size, device: torch.device) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(0, size.vocabulary, (n,), generator=generator).to(device) for n in size.lengths]
    return dict.fromkeys(size.shapes, found)


def _real_documents(
    rows: Rows | None, size: Size, tokenizer: Path, device: torch.device
) -> dict[str, list[Tensor]]:
    """As many tokens as part (a) has, of the held-out rows or of the packaged model's held-out text."""
    if rows is not None:
        all_ids = [torch.from_numpy(row.input_ids).long() for row in rows.evaluation]
    else:
        texts = [text for of_kind in held_out_documents().values() for text in of_kind]
        all_ids = [torch.tensor(ids) for ids in load_tokenizer(str(tokenizer))(texts)["input_ids"]]
    found: list[Tensor] = []
    for ids in all_ids:
        if sum(map(len, found)) < sum(size.lengths):
            found.append(ids[: max(size.lengths)].to(device))
    return {"plain": found, "outliers": found}


def _start_gathering(out: Path, tokenizer: Path, megabytes: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.benchmarks.quality.corpus", "--megabytes", str(megabytes)]
    return subprocess.Popen([*command, "--tokenizer", str(tokenizer), "--out", str(out / "tokens.npy")])


def _train(
    out: Path,
    tokenizer: Path,
    seconds: float,
    device: torch.device,
    text: subprocess.Popen[bytes],
    findings: Findings,
) -> None:
    """Wait for the text and train the base on it."""
    with _timed("waiting for the text", findings):
        if text.wait():
            raise SystemExit("the text could not be gathered; see above")
    settings = Settings(
        minutes=seconds / 60,
        epochs=2,
        batch_tokens=32_768,
        learning_rate=1e-3,
        compile_model=False,
        seed=0,
    )
    with _timed("training the base", findings):
        config = configuration(len(load_tokenizer(str(tokenizer))))
        notes = train_base(out / "tokens.npy", out / "base", config, settings, device)
    (out / "base" / "training.json").write_text(json.dumps(notes, indent=1) + "\n")
    last = notes[-1]
    findings.about["base"] = (
        f"{last['tokens']:,} tokens in {last['seconds']} s, held-out loss {last['held_out_loss']['text']:.3f}"
    )


def _jobs(bases: dict[str, str], variants: list[Variant], seeds: list[int]) -> list[Job]:
    """Every variant on both paths, the slowest first; mutants and a repetition of the first."""
    jobs: dict[Job, None] = {}
    for variant in sorted(variants, key=lambda each: each.quantize_mode != "8bit"):
        for base, folder in bases.items():
            for seed in seeds:
                stock = Job(base=base, folder=folder, variant=stock_of(variant), path="stock", seed=seed)
                jobs[stock] = None
                jobs[Job(base=base, folder=folder, variant=variant, path="fast", seed=seed)] = None
    base, folder = next(iter(bases.items()))
    first = Job(base=base, folder=folder, variant=variants[0], path="fast", seed=seeds[0])
    for mutant in LEARNING_MUTANTS:
        jobs[replace(first, mutant=mutant)] = None
    jobs[replace(first, variant=stock_of(first.variant), path="stock", repeat=1)] = None
    return list(jobs)


def _pool(workers: int, rows: Rows, schedule: Schedule) -> ProcessPoolExecutor:
    """Processes that are starting up already: it takes them as long as a run."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_receive, initargs=(rows, schedule))
    for _ in range(workers):
        pool.submit(time.sleep, 1)
    return pool


_received: tuple[Rows, Schedule]


def _receive(rows: Rows, schedule: Schedule) -> None:
    global _received
    _received = (rows, schedule)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 4))
    warnings.simplefilter("ignore", FutureWarning)


def _fine_tune(job: Job, device: torch.device) -> Run:
    return fine_tune(job, *_received, device)


def _run(
    jobs: list[Job],
    pool: ProcessPoolExecutor | None,
    rows: Rows,
    schedule: Schedule,
    device: torch.device,
) -> list[Run]:
    if pool is None:
        return [_told(fine_tune(job, rows, schedule, device)) for job in jobs]
    with pool:
        runs: list[Future[Run]] = [pool.submit(_fine_tune, job, device) for job in jobs]
        return [_told(run.result()) for run in runs]


def _told(run: Run) -> Run:
    job = run.job
    print(
        f"- {job.base}, {job.variant.name}, {job.mutant or job.path}, seed {job.seed}: {run.untrained:.4f} → "
        f"{run.own:.4f}, on the stock path {run.by_stock:.4f}; {run.steps} steps, {run.seconds:.0f} s",
        flush=True,
    )
    return run


if __name__ == "__main__":
    raise SystemExit(main())
