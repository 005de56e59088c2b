"""The package: what the wheel holds, that it runs where nothing else is, and pins that agree everywhere."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import falcon_qlora

# What a CUDA build of torch brings along; torch itself pins these.
_BROUGHT_BY_TORCH = ("nvidia-", "cuda-")


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins(repository: Path) -> dict[str, Version]:
    """The version of each package in launch/constraints.txt."""
    lines = (repository / "launch/constraints.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in split}


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    build = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "--wheel-dir",
        str(target),
        str(repository),
    ]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (file,) = target.glob("*.whl")
    return file


def test_every_dependency_is_pinned_within_its_bounds(
    project: dict[str, Any], pins: dict[str, Version]
) -> None:
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(line)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_libraries_whose_private_methods_are_overridden_are_bounded_from_above(
    project: dict[str, Any], pins: dict[str, Version]
) -> None:
    bounded = {Requirement(line).name: Requirement(line).specifier for line in project["dependencies"]}
    for name in ("accelerate", "peft", "transformers", "trl"):
        tried = pins[name]
        assert not bounded[name].contains(f"{tried.major}.{tried.minor + 1}.0"), name


@pytest.mark.slow
def test_no_release_that_an_extra_pins_has_been_withdrawn(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"].values()
    exact = [line for lines in extras for line in lines if "==" in line and ";" not in line]
    assert exact
    asked = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "--quiet",
    ]
    done = subprocess.run(
        [*asked, "--disable-pip-version-check", "--retries", "1", *exact], capture_output=True, text=True
    )
    if "(from versions: none)" in done.stderr:
        pytest.skip("there is no package index here")
    assert done.returncode == 0, done.stderr
    assert "yanked" not in done.stderr, done.stderr


def test_the_version_is_told_once(project: dict[str, Any]) -> None:
    assert project["version"] == falcon_qlora.__version__


def test_what_the_dependencies_bring_along_is_pinned_too(pins: dict[str, Version]) -> None:
    missing, waiting, seen = [], [Requirement("falcon-qlora[dev]")], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, tuple(requirement.extras)) in seen:
            continue
        seen.add((name, tuple(requirement.extras)))
        if name not in pins and name != "falcon-qlora" and not name.startswith(_BROUGHT_BY_TORCH):
            missing.append(name)
        environments = [{"extra": extra} for extra in (requirement.extras or {""})]
        for line in importlib.metadata.requires(requirement.name) or []:
            needed = Requirement(line)
            if not needed.marker or any(needed.marker.evaluate(given) for given in environments):
                waiting.append(needed)
    assert missing == []


def test_conda_installs_the_same_pins(
    repository: Path, project: dict[str, Any], pins: dict[str, Version]
) -> None:
    environment = yaml.safe_load((repository / "environment.yaml").read_text())
    (python,) = [line for line in environment["dependencies"] if str(line).startswith("python=")]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python.split("=")[1])
    (from_pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert from_pip[0] == "--constraint launch/constraints.txt"
    assert from_pip[-1] == "--editable ."
    listed = {}
    for line in from_pip[1:-1]:
        name, version = line.split("==")
        listed[canonicalize_name(name)] = Version(version)
    needed = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    assert listed == {name: pins[name] for name in needed}


def test_the_wheel_holds_everything_in_the_package(wheel: Path, repository: Path) -> None:
    listing = ["git", "-C", str(repository), "ls-files", "falcon_qlora"]
    tracked = set(subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split())
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        metadata = archive.read(next(name for name in packed if name.endswith("/METADATA"))).decode()
        entry_points = archive.read(
            next(name for name in packed if name.endswith("entry_points.txt"))
        ).decode()
    assert {name for name in tracked if (repository / name).exists()} <= packed
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    assert "License-Expression: Apache-2.0" in metadata
    assert "falcon-qlora = falcon_qlora.__main__:main" in entry_points


def test_the_packaged_weights_stay_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        weights = sum(item.file_size for item in archive.infolist() if "/models/tiny/" in item.filename)
    assert 0 < weights <= 10 * 10**6


def test_every_test_marker_and_tool_is_in_pyproject(repository: Path) -> None:
    tools = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]
    assert {"ruff", "mypy", "pytest", "importlinter"} <= tools.keys()
    assert {marker.split(":")[0] for marker in tools["pytest"]["ini_options"]["markers"]} == {"gpu", "slow"}


def test_every_script_is_valid_and_can_be_run(repository: Path) -> None:
    for name in ("launch/quickstart", "launch/test", ".ci/run", "launch/setup"):
        subprocess.run(["bash", "-n", str(repository / name)], check=True)
    for name in ("launch/quickstart", "launch/test", ".ci/run"):
        assert os.access(repository / name, os.X_OK), name


def test_the_top_level_is_the_documented_one(repository: Path) -> None:
    listing = subprocess.run(
        ["git", "-C", str(repository), "ls-files"], capture_output=True, text=True, check=True
    )
    top = {name.split("/")[0] for name in listing.stdout.splitlines()}
    documented = {
        "pyproject.toml",
        "README.md",
        "environment.yaml",
        "falcon_qlora",
        "launch",
        "tests",
        "LICENSE",
    }
    assert {name for name in top if not name.startswith(".")} <= documented


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_environment(wheel: Path, repository: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv/bin"
    pins_file = str(repository / "launch/constraints.txt")
    # Python compiles what is imported; pip would compile all that the libraries have.
    install = ["-m", "pip", "install", "--quiet", "--no-compile", "--constraint", pins_file, str(wheel)]
    subprocess.run([programs / "python", *install], check=True)
    # Away from the checkout, and with nothing of this environment.
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))
    }

    def run(*command: str) -> str:
        result = subprocess.run(
            [str(programs / command[0]), *command[1:]],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    assert str(tmp_path) in run("python", "-c", "import falcon_qlora; print(falcon_qlora.__file__)")
    assert "--quantize_mode" in run("falcon-qlora", "train", "--help")
    rows = [
        {"instruction": f"Say {word}.", "input": "", "output": word} for word in ("one", "two", "three") * 4
    ]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["-m", "tiny", "-q", "4bit", "--gpus", "1", "-s", "2", "--max_length", "128", "--dataset_name"]
    run("falcon-qlora", "train", *flags, "rows.jsonl", "--output_dir", "run")
    assert (work / "run/adapter/adapter_model.safetensors").stat().st_size > 443
    summary = json.loads((work / "run/summary.json").read_text())
    assert summary["steps"] == 2
    answer = run("falcon-qlora", "generate", "--adapter", "run/adapter", "--prompt", "Say one.")
    assert re.search(r"\S", answer)
