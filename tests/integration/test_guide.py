"""Every command of README.md and of the guide runs, or says why not; so do the notebook's cells."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from falcon_qlora import __main__ as cli
from falcon_qlora.commands import compare
from falcon_qlora.commands import train as launcher
from tests import estimates_page, flags_page
from tests.conftest import REPOSITORY
from tests.integration import guide
from tests.integration.runs import in_process

GUIDE = REPOSITORY / "falcon_qlora/guide"
PAGES = [REPOSITORY / "README.md", *sorted(GUIDE.glob("*.md"))]
FIRST = GUIDE / "getting_started.md"  # trains the run that other pages use


def test_every_fence_runs_or_says_why_not() -> None:
    unexplained = []
    for page in PAGES:
        for fence in guide.fences(page):
            place = f"{fence.page}:{fence.line}"
            if fence.language not in (*guide.COMMANDS, *guide.SHOWN, "python"):
                unexplained.append(f"{place}: {fence.language} is neither run nor known as text")
            for each in fence.commands():
                first = each.text.splitlines()[0]
                told = "run" if each.why_not is None else f"not run ({each.why_not})"
                print(f"{place}: {told}: {first}")
                if each.why_not == "":
                    unexplained.append(f"{place}: neither run nor explained: {first}")
    assert unexplained == []


def test_the_page_of_flags_is_what_the_code_says() -> None:
    assert (GUIDE / "flags.md").read_text(encoding="utf-8") == flags_page.text(), (
        "python -m tests.flags_page writes falcon_qlora/guide/flags.md"
    )


@pytest.mark.parametrize("page", estimates_page.COMMANDS, ids=lambda page: page.stem)
def test_what_pages_say_of_cards_is_what_the_command_says(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == estimates_page.text(page), (
        "python -m tests.estimates_page writes it"
    )


@pytest.mark.parametrize("name", ["README", "families", "choosing"])
def test_speeds_and_memory_of_tables_are_those_of_the_records(name: str) -> None:
    with (REPOSITORY / "tests/benchmarks/records.csv").open(newline="") as file:
        measured = [(row["tokens_per_second"], row["peak_reserved_gb"]) for row in csv.DictReader(file)]
    known = {
        (f"{float(speed):,.0f}", f"{float(peak) * 10**9 / 2**30:.1f}")
        for speed, peak in measured
        if speed and peak
    }
    (page,) = (each for each in PAGES if each.stem == name)
    shown = set()
    for table in re.findall(r"^(\|.*\n)\|[-|]+\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.M):
        head, *rows = ([cell.strip() for cell in line.split("|")] for line in "".join(table).splitlines())
        for at, cell in enumerate(head):
            if re.search(r"\bGi?B$", cell) and "tokens/s" in head[at - 1]:
                shown |= {(row[at - 1], row[at]) for row in rows}
    assert len(shown) > 6
    assert shown <= known


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page's commands run, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "_run_one", in_process)

    # The runs of `compare`, which are processes: tests/integration/test_compare.py.
    def run(self: Any, command: list[str]) -> tuple[int, list[str]]:
        return cli.main(command[command.index("train") :]), []

    monkeypatch.setattr(compare._Child, "run", run)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return tmp_path


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first page leaves, trained a little."""
    run = tmp_path_factory.mktemp("guide") / "runs/first"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parents[1])
        patch.setattr(launcher, "_run_one", in_process)
        words = "-m tiny --dataset_name sample --max_length 64 --steps 2 -b 1 --lora_r 4 --report_to none"
        assert cli.main(["train", *words.split(), "--output_dir", "runs/first"]) == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(
    page: Path, folder: Path, first_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if page != FIRST:
        guide.copied(first_run, folder)
    names: dict[str, object] = {"__name__": "__main__"}
    for fence in guide.fences(page):
        for each in fence.commands():
            if each.why_not is not None:
                continue
            place = f"{fence.page}:{fence.line}: {each.text.splitlines()[0]}"
            capfd.readouterr()
            if fence.language == "python":
                exec(compile(guide.smaller(each.text, folder), place, "exec"), names)
                continue
            status = _run(each.text, folder)
            told = "".join(capfd.readouterr())
            refused = any(line.startswith("error:") for line in each.output)
            assert status == (2 if refused else 0), f"{place}: exit status {status}\n{told}"
            for line in each.output:
                assert guide.shows(told, line), f"{place} does not print\n{line}\nbut\n{told}"


def _run(text: str, folder: Path) -> int:
    if not text.startswith("falcon-qlora"):
        return subprocess.run(["bash", "-ec", text], cwd=folder).returncode
    return cli.main(guide.words_of(text, folder))


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(folder: Path) -> None:
    notebook = json.loads((GUIDE / "first_model.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert (folder / "merged/certificate.json").is_file()
