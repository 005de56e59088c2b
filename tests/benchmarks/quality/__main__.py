"""The quality gate: speed that costs quality does not count.

    python -m tests.benchmarks.quality --data gsm8k_train.json --tokenizer FOLDER --out FOLDER

On one GPU, in minutes. Three parts: (a) block outputs and every gradient of the published shapes against
float32; (b) the same for whole trained models, with and without outliers; (c) fine-tuning with the stock path
and with the fast path. The stock path is PEFT's and bitsandbytes' modules under bfloat16 autocast. Mutants of
the fast path must be rejected. Writes ``quality.md`` and ``quality.json`` anew after every comparison; the
exit status is 1 if a variant that is on by default fails or was not reached in time, or a mutant passes.

(c) runs before (b), which says less. ``--tiny`` does it in small, on a CPU, with the packaged model in place
of one trained for the purpose, unless ``--text`` gives it text to train one on. ``--family falcon-h1`` trains
one of that family.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from falcon_qlora.common.errors import EXIT_USER_ERROR, UserError
from falcon_qlora.models.tiny import held_out_documents, tiny_path
from falcon_qlora.models.tokenizer import load_tokenizer
from tests.benchmarks.quality import workers
from tests.benchmarks.quality.base import FAMILIES, gathering, save_with_outliers, train_on_gathered
from tests.benchmarks.quality.distances import Comparison, compare
from tests.benchmarks.quality.learning import Job, Rows, fine_tune
from tests.benchmarks.quality.report import (
    Findings,
    comparison_lines,
    decides,
    failures,
    name_of,
    run_line,
    stock_of,
    to_json,
    to_markdown,
)
from tests.benchmarks.quality.sizes import FULL, TINY, Size
from tests.benchmarks.quality.variants import VARIANTS, NotBuilt, Variant, build

# Of LoRA's second matrices in part (b). Larger ones drown a model with outliers, which LoRA's first matrices
# see in full: its gradients are then noise in bfloat16, whoever computes them.
TRAINED_ADAPTER_STD = 0.01
LEARNING_MUTANTS = ("half the LoRA scale", "one block without its adapter")


@dataclass(kw_only=True)
class Course:
    """One run of the gate: where it runs, and what it has found so far."""

    size: Size
    device: torch.device
    out: Path
    tokenizer: Path
    findings: Findings
    variants: list[Variant] = field(default_factory=list)

    def write(self) -> str:
        """After every comparison: what was found is not lost to a later fault."""
        report = to_markdown(self.findings)
        (self.out / "quality.md").write_text(report)
        (self.out / "quality.json").write_text(to_json(self.findings))
        return report

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the processes beside this one
        seconds = time.monotonic() - started
        self.findings.about[f"{what}, seconds"] = round(seconds, 1)
        print(f"- {what}: {seconds:.0f} s", flush=True)
        self.write()


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    warnings.simplefilter("ignore", FutureWarning)  # of Transformers, about its own names
    torch.set_float32_matmul_precision("highest")  # float32 is the truth here: no TF32
    size = TINY if arguments.tiny else FULL
    size = replace(size, **({} if arguments.rows is None else {"rows": arguments.rows}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    arguments.out.mkdir(parents=True, exist_ok=True)
    course = Course(
        size=size,
        device=device,
        out=arguments.out,
        tokenizer=tiny_path() if arguments.tiny else arguments.tokenizer,
        findings=Findings(about={"device": name, "torch": torch.__version__}),
    )
    try:
        with ExitStack() as stack:
            _run_parts(course, arguments, stack)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    print(course.write(), flush=True)
    return int(any(decides(name) for name in failures(course.findings)))


def _run_parts(course: Course, arguments: argparse.Namespace, stack: ExitStack) -> None:
    """Run the parts that are asked for; what has to end with them goes on the stack."""
    parts, size, findings = set(arguments.parts), course.size, course.findings
    trains = (
        bool(parts & {"b", "c"}) and arguments.base is None and not (arguments.tiny and not arguments.text)
    )
    pool = setting = text = rows = None
    if arguments.data is not None:
        setting = workers.Setting(
            data=arguments.data,
            tokenizer=course.tokenizer,
            held_out=size.held_out,
            limit=size.rows,
            schedule=size.schedule,
            device=course.device,
        )
        rows = setting.rows()
        findings.about["fine-tuning"] = (
            f"{len(rows.training)} rows, {size.schedule.epochs} epochs in steps of "
            f"{size.schedule.batch_tokens:,} tokens; evaluated on {len(rows.evaluation)} rows"
        )
    if trains:
        where = course.out / "tokens.npy"
        text = stack.enter_context(gathering(where, course.tokenizer, arguments.megabytes, arguments.text))
    count = size.workers if arguments.workers is None else arguments.workers
    if setting is not None and "c" in parts and count:
        pool = stack.enter_context(workers.started(count, setting))
    course.variants = _buildable(arguments.variants or size.variants, course)
    if "a" in parts:
        documents = _random_documents(size, course.device)
        _compare_all(course, "a", size.shapes, documents, size.adapter_std, arguments.minutes_a)
    if not parts & {"b", "c"}:
        return
    base = arguments.base or (tiny_path() if arguments.tiny else course.out / "base")
    if text is not None:
        base = course.out / "base"
        with course.timed("waiting for the text"):
            text.wait()
        with course.timed("training the base"):
            tokenizer = load_tokenizer(str(course.tokenizer))
            findings.about["base"] = train_on_gathered(
                course.out, tokenizer, size, arguments.family, arguments.seconds, course.device
            )
    save_with_outliers(base, course.out / "base-outliers")
    bases = {"plain": str(base), "outliers": str(course.out / "base-outliers")}
    if "c" in parts and course.variants:
        assert rows is not None
        _fine_tune_all(
            course, _jobs(bases, course.variants, arguments.seeds), pool, rows, arguments.minutes_c
        )
    if "b" in parts:
        real = _real_documents(rows, course)
        _compare_all(course, "b", bases, dict.fromkeys(bases, real), TRAINED_ADAPTER_STD, arguments.minutes_b)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.quality", description="Whether the fast path keeps the quality."
    )
    parser.add_argument("--data", type=Path, help="rows with Alpaca columns, GSM8K's")
    parser.add_argument("--tokenizer", type=Path, help="folder of Falcon's tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report and the models")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), help="the most important first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--parts", nargs="+", choices=("a", "b", "c"), default=["a", "b", "c"])
    parser.add_argument("--minutes_a", type=float, default=3, help="for part a; no comparison starts later")
    parser.add_argument("--minutes_b", type=float, default=2, help="the same for part b")
    parser.add_argument("--minutes_c", type=float, default=4, help="for part c; what still runs is ended")
    parser.add_argument("--rows", type=int, help="of the data at most, the held-out ones included")
    parser.add_argument("--workers", type=int, help="processes that fine-tune; 0 for none beside this one")
    parser.add_argument("--family", choices=FAMILIES, default="falcon", help="of the base that is trained")
    parser.add_argument("--base", type=Path, help="folder of an earlier run's base, instead of training one")
    parser.add_argument("--seconds", type=float, default=150, help="to train the base for")
    parser.add_argument("--text", type=Path, help="file or folder to train it on, not what is installed")
    parser.add_argument("--megabytes", type=float, default=280, help="of text to train it on")
    parser.add_argument("--tiny", action="store_true", help="in small, with the packaged model")
    arguments = parser.parse_args(argv)
    if not arguments.tiny and (arguments.data is None or arguments.tokenizer is None):
        parser.error("without --tiny it needs --data and --tokenizer")
    if arguments.data is None and "c" in arguments.parts:
        parser.error("part c needs --data")
    if arguments.tiny and arguments.family != "falcon" and not (arguments.text or arguments.base):
        parser.error(f"--family {arguments.family}: give --text to train one on, or --base")
    for flag in ("data", "tokenizer", "base", "text"):
        path: Path | None = getattr(arguments, flag)
        if path is not None and not path.exists():
            parser.error(f"--{flag}: there is no {path}")
    return arguments


def _buildable(names: tuple[str, ...], course: Course) -> list[Variant]:
    variants = []
    for name in names:
        try:
            build(VARIANTS[name], "tiny", course.device, "fast")
        except NotBuilt as error:
            course.findings.skipped[name] = str(error)
        else:
            variants.append(VARIANTS[name])
    return variants


def _compare_all(
    course: Course,
    part: str,
    models: dict[str, str],
    documents: dict[str, list[Tensor]],
    adapter_std: float,
    minutes: float,
) -> None:
    """The first variant on all models, then the next one."""
    findings = course.findings
    found: list[Comparison] = {"a": findings.kernel, "b": findings.model}[part]
    until = time.monotonic() + 60 * minutes
    with course.timed(f"part ({part})"):
        for variant in course.variants:
            for label, name in models.items():
                started = time.monotonic()
                if started > until:
                    findings.miss(variant.name, f"({part}) {label}", f"not reached in {minutes:.1f} minutes")
                    continue
                try:
                    found.append(compare(variant, label, name, documents[label], adapter_std))
                except NotBuilt as error:
                    findings.skipped[variant.name] = f"{label}: {error}"
                    continue
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                course.write()
                for line in comparison_lines(part, found[-1]):
                    print(line, flush=True)
                print(f"  in {time.monotonic() - started:.1f} s", flush=True)


def _random_documents(size: Size, device: torch.device) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(0, size.vocabulary, (n,), generator=generator).to(device) for n in size.lengths]
    return dict.fromkeys(size.shapes, found)


def _real_documents(rows: Rows | None, course: Course) -> list[Tensor]:
    """As many tokens as part (a) has, of the held-out rows or of the packaged model's held-out text."""
    if rows is not None:
        all_ids = [torch.from_numpy(row.input_ids).long() for row in rows.evaluation]
    else:
        texts = [text for of_kind in held_out_documents().values() for text in of_kind]
        all_ids = [torch.tensor(ids) for ids in load_tokenizer(str(course.tokenizer))(texts)["input_ids"]]
    lengths, found = course.size.lengths, list[Tensor]()
    for ids in all_ids:
        if sum(map(len, found)) < sum(lengths):
            found.append(ids[: max(lengths)].to(course.device))
    return found


def _jobs(bases: dict[str, str], variants: list[Variant], seeds: list[int]) -> list[Job]:
    """Every variant on both paths; after the first one mutants of it and a repetition."""
    jobs: dict[Job, None] = {}
    for variant in variants:
        for base, folder in bases.items():
            for seed in seeds:
                stock = Job(base=base, folder=folder, variant=stock_of(variant), path="stock", seed=seed)
                jobs[stock] = None
                jobs[replace(stock, variant=variant, path="fast")] = None
        if variant is variants[0]:
            base, folder = next(iter(bases.items()))
            first = Job(base=base, folder=folder, variant=variant, path="fast", seed=seeds[0])
            for mutant in LEARNING_MUTANTS:
                jobs[replace(first, mutant=mutant)] = None
            jobs[replace(first, variant=stock_of(variant), path="stock", repeat=1)] = None
    return list(jobs)


def _fine_tune_all(
    course: Course, jobs: list[Job], pool: ProcessPoolExecutor | None, rows: Rows, minutes: float
) -> None:
    """Run the jobs in the pool's processes, or in this one without a pool."""
    findings = course.findings
    if pool is None:
        outcomes = workers.outcomes_here(
            lambda job: fine_tune(job, rows, course.size.schedule, course.device), jobs, 60 * minutes
        )
    else:
        outcomes = workers.outcomes(pool, workers.fine_tune_received, jobs, 60 * minutes)
    with course.timed("part (c)"):
        for job, outcome in outcomes:
            if isinstance(outcome, str):
                findings.miss(job.variant.name, f"(c) {name_of(job)}", outcome)
                print(f"- (c) {name_of(job)}: {outcome}", flush=True)
            else:
                findings.learning.append(outcome)
                print(run_line(outcome), flush=True)
            course.write()


if __name__ == "__main__":
    # So that processes beside this one end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    raise SystemExit(main())
