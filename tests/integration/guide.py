"""The fenced commands of README.md and of the guide: what runs, made small, and why the others do not.

Fences of ``sh`` and ``console``, and those without a language, hold commands; ``python`` holds Python;
what else there is (``text``, ``json``, …) is shown and not run. What is not run says so:
``<!-- not run: WHY -->`` on the line before the fence, or ``# not run: WHY`` behind a command. `OUTSIDE` has
the reasons of programs that no page needs to excuse.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

COMMANDS = ("sh", "console", "")
SHOWN = ("text", "json", "jsonl", "yaml", "csv", "jinja")

# What a page says → what the test runs. Besides: `runs/…` is the newest run; a file of rows that is not there
# holds some of the packaged rows; a training of another model than `tiny` is cut to two steps of few tokens;
# a merge is measured on few, a bench has one round.
SUBSTITUTIONS = {
    r"(tiiuae|ybelkada)/[Ff]alcon[\w.-]*": "tiny",
    r"random:falcon-7b": "tiny",
    r"--gpus \d+|--nproc_per_node[ =]\d+": "--gpus 1",
}
SMALL = {"--max_length": "64", "--max_steps": "2", "-b": "1", "--lora_r": "4"}
SAME = {"-s": "--max_steps", "--steps": "--max_steps", "--per_device_train_batch_size": "-b"}

OUTSIDE = {
    r"(python -m )?pip ": "installs packages",
    r"(\./)?launch/|\.ci/": "has its own test: tests/unit/test_packaging.py",
    r"git |hf |wandb ": "needs the network",
    r"(python -m )?vllm ": "vLLM is not installed here",
    r"torchrun ": "started by tests/integration/test_data_parallel.py",
    r"python -m tests|pytest": "belongs to the checkout, not to the package",
    r".*(\bfp8\b|--recipe smallest|--nnodes [2-9]|fsdp)": "needs GPUs",
    r".*(--tasks|zero3|--push_to_hub)": "needs a further package, or a login",
    r"export |cd |tail |nvidia-smi|\. \.venv": "changes or shows the shell's own surroundings",
}
_SHELL = ("cat", "head", "ls", "mkdir", "cp", "echo", "rm")
_FENCE = re.compile(r"(?:<!-- not run: ([^\n]*?) -->\n+)?^```(\w*)\n(.*?)^```$", re.M | re.S)
_WHY = re.compile(r"#.*\bnot run: (.+)$")


@dataclass(frozen=True)
class Command:
    """One command of a fence.

    Attributes:
        text: as it stands there, its lines joined.
        output: the lines that a ``console`` fence shows under it.
        why_not: why it is not run; None for one that is; "" for one that nobody explains.
    """

    text: str
    output: tuple[str, ...] = ()
    why_not: str | None = None


@dataclass(frozen=True)
class Fence:
    page: str
    line: int
    language: str
    text: str
    why_not: str | None

    def commands(self) -> list[Command]:
        """What it holds, command by command; Python is one."""
        if self.language == "python":
            return [Command(self.text, why_not=self.why_not)]
        return list(self._commands()) if self.language in COMMANDS else []

    def _commands(self) -> Iterator[Command]:
        lines = self.text.replace("\\\n", " ").splitlines()
        while lines:
            line = lines.pop(0)
            if self.language == "console":
                if not line.startswith("$ "):
                    raise ValueError(f"{self.page}:{self.line}: output before a command: {line}")
                line = line.removeprefix("$ ")
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if here := re.search(r"<<'?(\w+)'?$", line):
                end = lines.index(here[1]) + 1
                line, lines = "\n".join([line, *lines[:end]]), lines[end:]
            output = []
            while self.language == "console" and lines and not lines[0].startswith("$ "):
                output.append(lines.pop(0))
            yield Command(line, tuple(output), self.why_not or _why_not(line))


def fences(page: Path) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    return [
        Fence(page.name, text.count("\n", 0, found.start(2)) + 1, found[2], found[3], found[1])
        for found in _FENCE.finditer(text)
    ]


def _why_not(line: str) -> str | None:
    if said := _WHY.search(line):
        return said[1]
    program = line.split()[0]
    for pattern, why in OUTSIDE.items():
        if re.match(pattern, line):
            return why
    return None if program == "falcon-qlora" or program in _SHELL else ""


def smaller(text: str, folder: Path) -> str:
    """A command or Python as the test runs it: `SUBSTITUTIONS`, and the files that it names made."""
    is_params = text.startswith("falcon-qlora params")
    for pattern, instead in {} if is_params else SUBSTITUTIONS.items():
        text = re.sub(pattern, instead, text)
    if "runs/…" in text:
        newest = max((folder / "runs").iterdir(), key=lambda each: each.stat().st_mtime)
        text = text.replace("runs/…", f"runs/{newest.name}")
    for name in re.findall(r"(?<![\w/.-])\w[\w./-]*\.(?:jsonl|json|csv)\b", text):
        _make_rows(folder / name, text)
    return text


def _make_rows(file: Path, text: str) -> None:
    if file.exists() or f"> {file.name}" in text:
        return
    packaged = resources.files("falcon_qlora.data.sample_data").joinpath("instructions.jsonl").read_text()
    lines = packaged.splitlines(keepends=True)[:100]
    rows = [json.loads(line) for line in lines]
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        body = "".join(f'"{row["instruction"]}","{row["output"]}"\n' for row in rows[:8])
        file.write_text(f"instruction,output\n{body}", encoding="utf-8")
    else:
        file.write_text("".join(lines) if file.suffix == ".jsonl" else json.dumps(rows), encoding="utf-8")


def words_of(text: str, folder: Path) -> list[str]:
    """The words after ``falcon-qlora``, of a command that trains in seconds."""
    small = smaller(text, folder)
    verb, *words = shlex.split(small, comments=True)[1:]
    known = {"train", "data", "prepare", "bench"}
    if verb in known and not {"-m", "--model_name_or_path", "--adapter", "--config", "--resume"} & {*words}:
        words += ["-m", "tiny"]
    if verb in known - {"bench"} and not {"--dataset_name", "--config", "--resume"} & {*words}:
        words += ["--dataset_name", "sample"]
    if verb == "merge" and "--held_out_tokens" not in words:
        words += ["--held_out_tokens", "2048"]
    if verb == "bench" and not {"--rounds", "--gpus"} & {*words}:
        words += ["--rounds", "1"]
    if verb == "train":
        words = _short(words) if small != text else words
        words += [] if "--report_to" in words else ["--report_to", "none"]
    return [verb, *words]


def _short(words: list[str]) -> list[str]:
    if "--resume" in words:
        return words
    given = [SAME.get(word, word) for word in words]
    for flag, value in SMALL.items():
        if flag not in given:
            given += [flag, value]
        elif int(given[given.index(flag) + 1]) > int(value):
            given[given.index(flag) + 1] = value
    return given


def skeleton(line: str) -> str:
    """A line of output without what differs from run to run: figures, durations and the widths of columns."""
    line = re.sub(r"\d[\d.,e-]*", "#", line)
    line = re.sub(r"(# min )?# s\b", "# s", line)
    return re.sub(r"[─━█]+", "─", " ".join(line.split()))


def shows(printed: str, line: str) -> bool:
    """Whether `line` of a page, ``…`` standing for anything, is among the lines printed."""
    wanted = [re.escape(part.strip()) for part in skeleton(line).split("…")]
    pattern = re.compile(r".*".join(wanted))
    return any(pattern.fullmatch(skeleton(each)) for each in printed.splitlines())


def copied(run: Path, folder: Path) -> None:
    """Lay the run of the first page, `runs/first`, into a page's folder."""
    shutil.copytree(run, folder / "runs/first")
