"""bitsandbytes is imported without a look at the network and without a warning, whoever imports it first."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from falcon_qlora.common.library_imports import ASKS

REPOSITORY = Path(__file__).resolve().parents[2]

# What bitsandbytes 0.50 does where the processor has bfloat16 instructions.
ASKING = """
import logging
try:
    from kernels import get_kernel
    print("asked")
except Exception as error:
    logging.getLogger(__name__).warning("Failed to load: %s", error)
"""


@pytest.mark.parametrize(
    ("first", "asked"), [("falcon_qlora", False), ("falcon_qlora.config", False), ("sys", True)]
)
def test_nothing_is_asked_for_and_nothing_said(tmp_path: Path, first: str, asked: bool) -> None:
    file = tmp_path.joinpath(*ASKS.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True)
    for folder in list(file.relative_to(tmp_path).parents)[:-1]:
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "bitsandbytes/__init__.py").write_text(f"import {ASKS}")
    file.write_text(ASKING)
    (tmp_path / "kernels.py").write_text("def get_kernel(): ...")
    code = f"import {first}, bitsandbytes, kernels, logging; logging.getLogger('{ASKS}').warning('later')"
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout == ("asked\n" if asked else "")
    assert done.stderr == "later\n"


def test_it_is_this_module_alone_that_asks() -> None:
    spec = find_spec("bitsandbytes")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    asking = [
        file.relative_to(package.parent).with_suffix("").as_posix().replace("/", ".")
        for file in package.rglob("*.py")
        if "kernels import get_kernel" in file.read_text(encoding="utf-8")
    ]
    assert set(asking) == {ASKS, "bitsandbytes.backends.mps.ops"}, "the second is Apple's"


def test_what_is_installed_is_listed_once() -> None:
    code = (
        "import importlib.metadata as metadata\n"
        "real, asked = metadata.packages_distributions, []\n"
        "metadata.packages_distributions = lambda: asked.append(1) or real()\n"
        "import falcon_qlora, transformers, trl.import_utils\n"
        "print(len(asked), metadata.packages_distributions.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout == "1 <lambda>\n"


def test_what_is_seldom_used_is_imported_on_use() -> None:
    code = (
        "import falcon_qlora, sys\n"
        "from trl.trainer import base_trainer\n"
        "from transformers.loss import loss_for_object_detection as losses\n"
        "print('wandb' in sys.modules, 'scipy.optimize' in sys.modules, base_trainer.is_wandb_available())\n"
        "print([each.tolist() for each in losses.linear_sum_assignment([[4, 1, 3], [2, 0, 5], [3, 2, 2]])])\n"
        "print(base_trainer.wandb.run, base_trainer.wandb.sdk is sys.modules['wandb'].sdk)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    # SciPy's own example of an assignment, of cost 5.
    assert done.stdout == "False False True\n[[0, 1, 2], [1, 0, 2]]\nNone True\n"
