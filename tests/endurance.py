"""Runs of two processes, interrupted at random moments again and again: always the run that was left alone.

    python -m tests.endurance --minutes 60 [--seed 7] [--draws 40]

Settings are drawn, and for each run so are a signal, the process that gets it and the moment. There is the
launcher, in which torchrun's agent runs, and there are the ranks, which tokenize in threads. The run goes
on from its last checkpoint until it is done; then every number and the adapter must be, to the last bit,
those of the run with the same settings that nothing happened to. After each interruption no process may be
left, no checkpoint lost, and no more than one error told. Of the interruptions 60 % must land inside a
step, a save or an evaluation. The seed is printed; the same seed draws the same. `endurance_log.txt` has
some.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from falcon_qlora.checkpoint.manifest import newest_whole
from tests.integration.interrupted import ROWS, assert_same_run, run, start
from tests.integration.processes import Processes
from tests.integration.runs import summary, write_jsonl
from tests.small_tokenizer import small_tokenizer

STEPS = 24
LEAST_INSIDE = 0.6
KINDS = ["SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1", "SIGSTOP"]  # the last one followed by SIGKILL
TARGETS = ["launcher", "0", "1"]
# What a process does, as its watchdog has it, inside a step, a save or an evaluation.
INSIDE = {
    *("reading data", "computing", "adding up the gradients", "waiting for the device"),
    *("evaluating", "adding up the evaluation", "saving a checkpoint", "awaiting the save"),
}
STOP = ("SIGTERM", "SIGINT", "SIGUSR1")
SECONDS = 300


@dataclass
class Log:
    """What was drawn and what became of it."""

    inside: int = 0
    draws: int = 0
    runs: int = 0
    failures: list[str] = field(default_factory=list)
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)

    def told(self) -> str:
        share = self.inside / max(1, self.draws)
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.kinds.items()))
        return (
            f"{self.runs} runs, {self.draws} interruptions, {self.inside} of them ({share:.0%}) inside a "
            f"step, a save or an evaluation; {len(self.failures)} failures\n{kinds}"
        )


class Endurance:
    """A folder with rows and a small model of each layout, in which runs are interrupted."""

    def __init__(self, folder: Path, seed: int):
        self.draw = random.Random(seed)
        self.log = Log()
        self.processes = Processes(folder)
        self._folder = folder
        self._places = folder / "places"
        self._places.mkdir()
        os.environ["PLACES"] = str(self._places)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        write_jsonl(folder / "rows.jsonl", ROWS)
        write_jsonl(folder / "more.jsonl", ROWS[:20])
        torch.manual_seed(0)
        small = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        config = LlamaConfig(vocab_size=512, num_key_value_heads=2, head_dim=32, eos_token_id=0, **small)
        disable_progress_bar()
        LlamaForCausalLM(config).save_pretrained(folder / "llama")
        small_tokenizer().save_pretrained(folder / "llama")
        self._pairs = self._shuffled()

    def _shuffled(self) -> list[tuple[str, str]]:
        pairs = list(itertools.product(KINDS, TARGETS))
        self.draw.shuffle(pairs)
        return pairs

    def settings(self) -> list[str]:
        """The settings of a run."""
        draw = self.draw
        method = draw.choice(["lora", "lora", "adapter_v2", "full"])
        words = ["-m", draw.choice(["tiny", "llama"]), "--method", method, "--max_length", "64", "-b", "2"]
        words += ["-q", "16bit" if method == "full" else draw.choice(["4bit", "8bit"])]
        words += draw.choice(
            [
                ["--dataset_name", "rows.jsonl"],
                ["--dataset_name", "rows.jsonl", "--packing", "false"],
                ["--dataset_name", "rows.jsonl", "--streaming", "true"],
                ["--dataset_name", "rows.jsonl", "more.jsonl", "--dataset_weights", "1", "2"],
            ]
        )
        if method == "lora":
            words += ["--lora_r", "8", "--lora_dropout", draw.choice(["0", "0.1"])]
        if method == "adapter_v2":
            words += ["--adapter_first_block", "1"]
        words += ["--gradient_accumulation_steps", draw.choice(["1", "2"])]
        words += ["--save_total_limit", draw.choice(["1", "2", "3"]), "--save_steps", draw.choice(["2", "3"])]
        if "--streaming" not in words and draw.random() < 0.5:
            words += ["--eval_split", "0.2", "--eval_steps", words[-1], "--load_best_model_at_end", "true"]
        return [
            *words,
            "--steps",
            str(STEPS),
            "--logging_steps",
            "3",
            "--learning_rate",
            "1e-3",
            "--report_to",
            "none",
        ]

    def trajectory(self, deadline: float, most: int) -> None:
        """A run that is interrupted until it is done, beside the run that is not."""
        self.log.runs += 1
        number, settings = self.log.runs, self.settings()
        print(f"run {number}: {' '.join(settings)}", flush=True)
        whole, folder = f"whole-{number}", f"run-{number}"
        status, _, errors = run(self.processes, "--output_dir", whole, settings=settings)
        assert (status, errors) == (0, ""), (status, errors)
        seconds = summary(self._folder / whole)["train_seconds"]
        while self.log.draws < most and time.monotonic() < deadline:
            if self._interrupt(folder, settings, seconds):
                break
        if not (self._folder / folder / "adapter").exists():
            status, output, errors = run(
                self.processes, "--output_dir", folder, *self._resume(folder), settings=settings
            )
            assert (status, errors) == (0, ""), (status, output, errors)
        assert_same_run(self._folder / whole, self._folder / folder)
        print(f"run {number}: the same to the last bit", flush=True)

    def _resume(self, folder: str) -> list[str]:
        if self._newest(folder):
            return ["--resume"]
        return ["--overwrite"] if (self._folder / folder).exists() else []

    def _newest(self, folder: str) -> int:
        found, faulty = newest_whole(self._folder / folder / "checkpoints")
        assert faulty == [], faulty
        return int(found.name.split("-")[1]) if found else 0

    def _interrupt(self, folder: str, settings: list[str], seconds: float) -> bool:
        """Start the run, or go on with it, and interrupt it once; whether it is done."""
        self._pairs = self._pairs or self._shuffled()
        kind, target = self._pairs.pop()
        before = self._newest(folder)
        for file in self._places.iterdir():
            file.unlink()
        process = start(self.processes, "--output_dir", folder, *self._resume(folder), settings=settings)
        begun = time.monotonic()
        moment, early = self.draw.random(), self.draw.random() < 0.15
        if not early:
            while process.poll() is None and len(self._pids()) < 2 and time.monotonic() < begun + SECONDS:
                time.sleep(0.01)
        time.sleep(moment * (2.0 if early else 0.8 * seconds * (1 - before / STEPS)))
        pids = self._pids()
        rank = target if target != "launcher" else "0"
        place = pids[rank][1] if rank in pids and process.poll() is None else "before the first step"
        place = place if process.poll() is None else "when it had ended"
        pid = process.pid if target == "launcher" else pids.get(rank, (None, ""))[0]
        if pid is None:  # not yet known: what would be asked of a rank is asked of the launcher
            pid, target = process.pid, "launcher"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.Signals[kind])
            if kind == "SIGSTOP":
                time.sleep(1)
                os.kill(pid, signal.SIGKILL)
        output, errors = process.communicate(timeout=SECONDS)
        who = target if target == "launcher" else f"rank {target}"
        done = (self._folder / folder / "adapter").exists()
        told = [line for line in errors.splitlines() if line.startswith("error:")]
        self.log.draws += 1
        self.log.kinds[f"{kind} to {who}"] += 1
        inside = re.sub(r" at step \d+$", "", place) in INSIDE
        self.log.inside += inside
        line = (
            f"  {self.log.draws}: {kind} to {who}, {place} -> status {process.returncode}, checkpoint "
            f"{before} -> {self._newest(folder)}{', done' * done}{': ' * bool(told)}{'; '.join(told)}"
        )
        print(line, flush=True)
        faults = [
            "a process stayed" * (not self.processes.none_left()),
            "a checkpoint was lost" * (self._newest(folder) < before),
            "a traceback" * ("Traceback" in errors),
            "more than one message" * (len(told) > 1),
            "no message" * (process.returncode not in (0, 75, -signal.SIGKILL) and not told),
        ]
        if inside and not done:
            killed = kind not in STOP
            expected = (-signal.SIGKILL if target == "launcher" else 1) if killed else 75
            faults.append(f"expected status {expected}" * (process.returncode != expected))
            faults.append(
                "it is not said where it stopped" * (not killed and "stopped at step" not in output)
            )
        self.log.failures += [f"{line}: {fault}\n{output}\n{errors}" for fault in faults if fault]
        return done

    def _pids(self) -> dict[str, tuple[int, str]]:
        """Rank → its process, and where it is."""
        found = {}
        for file in self._places.glob("[0-9]*"):
            pid, step, what = file.read_text().split(" ", 2)
            found[file.name] = int(pid), f"{what} at step {step}"
        return found


def main(argv: list[str]) -> int:
    """Interrupt runs for so long, or so often; the exit status is 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--draws", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    wanted = parser.parse_args(argv)
    print(f"seed {wanted.seed}", flush=True)
    deadline = time.monotonic() + 60 * wanted.minutes
    with tempfile.TemporaryDirectory() as folder:
        endurance = Endurance(Path(folder), wanted.seed)
        try:
            while time.monotonic() < deadline and endurance.log.draws < wanted.draws:
                endurance.trajectory(deadline, wanted.draws)
        finally:
            endurance.processes.end()
            print(*endurance.log.failures, endurance.log.told(), sep="\n", flush=True)
    enough = endurance.log.inside >= LEAST_INSIDE * endurance.log.draws
    return 0 if enough and not endurance.log.failures else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
