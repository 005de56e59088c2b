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


def test_what_is_installed_is_listed_only_for_packages_of_another_name() -> None:
    code = (
        "import importlib.metadata as metadata\n"
        "real, asked = metadata.packages_distributions, []\n"
        "metadata.packages_distributions = lambda: asked.append(1) or real()\n"
        "import falcon_qlora, transformers, trl.import_utils as trl\n"
        "print(len(asked), metadata.packages_distributions.__name__)\n"
        "of = trl.PACKAGE_DISTRIBUTION_MAPPING\n"
        "print(of['peft'], of.get('yaml')[0], of.get('no_such_package'), len(asked))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.splitlines() == ["0 <lambda>", "['peft'] PyYAML None 1"]


@pytest.mark.slow
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


LIBRARIES = (
    "import falcon_qlora.training.trainer, sys\n"
    "from falcon_qlora.common.late_imports import LATE\n"
    "real = lambda: {n for n in LATE if type(sys.modules.get(n)).__name__ not in ('OnUse', 'NoneType')}\n"
)


def printed(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    return done.stdout.splitlines()


def test_a_training_process_loads_neither_the_compiler_nor_sharded_tensors() -> None:
    code = (
        "from falcon_qlora.common import late_imports\n"
        "late_imports.put_off()\n" + LIBRARIES + "import torch\n"
        "parameter = torch.nn.Parameter(torch.ones(2))\n"
        "optimizer = torch.optim.AdamW([parameter])\n"
        "parameter.sum().backward(); optimizer.step()\n"
        "print(real(), 'sympy' in sys.modules)\n"
        "from torch.distributed.tensor import DTensor\n"
        "from accelerate.utils.other import is_compiled_module\n"
        "print(isinstance(parameter, DTensor), is_compiled_module(torch.nn.Linear(1, 1)), real())\n"
    )
    assert printed(code) == ["set() False", "False False set()"]


@pytest.mark.slow
def test_what_was_put_off_is_the_real_thing_once_used(tmp_path: Path) -> None:
    code = (
        "from falcon_qlora.common import late_imports\n"
        "late_imports.put_off()\n" + LIBRARIES + "import torch\n"
        "from torch.distributed.tensor import DTensor, Replicate, distribute_tensor\n"
        "from torch.distributed.fsdp import FSDPModule, fully_shard\n"
        f"torch.distributed.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=0, "
        "world_size=1)\n"
        "mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (1,))\n"
        "spread = distribute_tensor(torch.arange(4.0), mesh, [Replicate()])\n"
        "print(type(spread).__name__, isinstance(spread, DTensor), isinstance(spread.to_local(), DTensor))\n"
        "model = torch.nn.Linear(2, 2)\n"
        "fully_shard(model, mesh=mesh)\n"
        "print(isinstance(model, FSDPModule), isinstance(model.weight, DTensor))\n"
        "class Mine(DTensor): pass\n"
        "print(Mine.__mro__[1] is type(spread))\n"
        "twice = torch.compile(lambda x: 2 * x, backend='eager')\n"
        "print(twice(torch.ones(1)).item(), isinstance(twice, torch._dynamo.eval_frame.OptimizedModule))\n"
        "print(sorted(real()))\n"
    )
    assert printed(code) == [
        "DTensor True False",
        "True True",
        "True",
        "2.0 False",
        str(
            [
                "torch._dynamo",
                "torch.distributed._composable",
                "torch.distributed.fsdp",
                "torch.distributed.tensor",
            ]
        ),
    ]


@pytest.mark.slow
def test_the_models_of_an_installed_release_are_listed_once(tmp_path: Path) -> None:
    code = (
        "import builtins, json, sys\n"
        "import falcon_qlora, transformers\n"
        "import transformers.models\n"
        "names = transformers.__dir__(), transformers.models.__dir__()\n"
        "print(json.dumps([sorted(each) for each in names]))\n"
    )
    plain = code.replace("import falcon_qlora, ", "import ")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", each],
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
            env=environment,
        ).stdout
        for each in (code, code, plain)
    ]
    kept = list((tmp_path / "falcon_qlora/libraries").iterdir())
    assert len(kept) == 2
    assert outputs[0] == outputs[1] == outputs[2]
    assert '"FalconH1ForCausalLM"' in outputs[0]
    for file in kept:  # what is damaged is listed anew
        file.write_bytes(file.read_bytes().replace(b"FalconH1", b"FalconH2"))
    again = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env=environment,
    )
    assert again.stdout == outputs[0]
