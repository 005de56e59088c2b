"""A method is one file: one that is made here, BitFit on the norms, is trained, told of, resumed and opened.

Nothing but the table knows its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

import falcon_qlora
from falcon_qlora import __main__ as cli
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.methods import table
from falcon_qlora.methods.interface import Method, method_of, remember, setting
from falcon_qlora.models.tiny import tiny_path
from tests.integration.test_adapter import fine_tune


@dataclass(frozen=True, kw_only=True)
class Norms(Method):
    """Train the weights of the last norms, and their biases too where that is wanted."""

    blocks: int = setting(2, "Blocks, from the end.", name="norm_blocks", label="in {} blocks", least=1)
    biases: bool = setting(False, "Their biases too.", name="norm_biases", label="with biases")
    note: str = setting("", "What the run is for.", name="norm_note", label="({})", decisive=False)

    name: ClassVar[str] = "norms"
    title: ClassVar[str] = "Norms"
    trains: ClassVar[str] = "the norms' weights"
    kinds: ClassVar[dict[str, str]] = {"": "norms"}
    kinds_of_base: ClassVar[tuple[str, ...]] = ("norms",)

    def saved_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        vectors = ["weight", "bias"] if self.biases else ["weight"]
        places = range(config.num_hidden_layers - self.blocks, config.num_hidden_layers)
        names = [f"transformer.h.{place}.input_layernorm.{vector}" for place in places for vector in vectors]
        return dict.fromkeys(names, (config.hidden_size,))

    def attach(self, model: Any, *, seed: int = 0) -> nn.Module:
        for name in self.saved_shapes(model.config):
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        remember(model, self)
        return model.train()


NORM = "transformer.h.4.input_layernorm.weight"
FLAGS = {
    "method": "norms",
    "norm_blocks": 1,
    "norm_biases": True,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
}


@pytest.fixture(autouse=True)
def norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.METHODS, Norms.name, Norms)


@contextmanager
def refused(told: str) -> Iterator[None]:
    with pytest.raises(UserError) as caught:
        yield
    assert told in str(caught.value)


def test_its_flags_are_read_and_checked_as_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--method", "norms", "--norm_blocks", "3"]).method == Norms(blocks=3)
    with pytest.raises(SystemExit):
        parse(["--help-all"])
    assert "Blocks, from the end. (default: 2)" in capsys.readouterr().out
    with refused("--norm_blocks: 0 is too small; at least 1"):
        parse(["--method", "norms", "--norm_blocks", "0"])
    with refused("--norm_blocks does nothing with --method lora"):
        parse(["--norm_blocks", "1"])
    with refused("--lora_r does nothing with --method norms"):
        parse(["--method", "norms", "--lora_r", "4"])
    written = yaml.safe_dump(parse(["--method", "norms", "--norm_biases", "true"]).resolved())
    (tmp_path / "config.yaml").write_text(written)
    assert parse(["--config", str(tmp_path / "config.yaml")]).method == Norms(biases=True)


def test_it_is_trained_told_of_resumed_and_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fine_tune(tmp_path, **FLAGS, max_steps=2, save_steps=1)
    described = "Norms in 1 blocks, with biases"
    assert described in capsys.readouterr().out  # the start summary

    folder = run / "adapter"
    card = (folder / "README.md").read_text()
    assert "# Norms for tiny" in card
    assert "the norms' weights" in card
    assert all(row in card for row in ("| norm_blocks | 1 |", "| norm_biases | yes |"))
    record = json.loads((folder / "falcon_qlora.json").read_text())
    assert (record["method"], record["norm_blocks"], record["norm_biases"]) == ("norms", 1, True)
    for inspected in (run, folder, run / "checkpoints" / "step-2"):
        assert cli.main(["inspect", str(inspected)]) == 0
        assert described in capsys.readouterr().out

    trained, base = load_file(folder / "adapter_model.safetensors"), plain_base()
    started = dict(base.named_parameters())
    assert trained.keys() == {NORM, NORM.replace("weight", "bias")}
    assert not torch.equal(trained[NORM], started[NORM])
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        for name, tensor in trained.items():
            started[name].copy_(tensor)
        opened = falcon_qlora.load_adapter(folder)
        assert method_of(opened) == Norms(blocks=1, biases=True)
        torch.testing.assert_close(opened(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)
    assert cli.main(["merge", "--adapter", str(run), "--out", str(tmp_path / "merged")]) == 2
    assert "trained with Norms and cannot be merged" in capsys.readouterr().err

    longer = {**FLAGS, "max_steps": 3, "output_dir": run, "resume": "latest"}
    with refused("norm_biases was True in the run to resume and is False now"):
        fine_tune(tmp_path, **longer | {"norm_biases": False})
    fine_tune(tmp_path, **longer, norm_note="again")
    assert not torch.equal(load_file(folder / "adapter_model.safetensors")[NORM], trained[NORM])


def plain_base() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval()


def test_what_a_lora_is_scaled_by_is_told_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"lora_r": 2, "use_dora": True, "use_rslora": True}
    run = fine_tune(tmp_path, **settings, max_steps=1)
    assert "LoRA r 2, alpha 16, dropout 0, rsLoRA, DoRA" in capsys.readouterr().out
    card = (run / "adapter" / "README.md").read_text()
    for folder in (run, run / "adapter"):
        assert cli.main(["inspect", str(folder)]) == 0
        told = capsys.readouterr().out
        assert "rsLoRA, DoRA" in told
    for use in ("use_dora", "use_rslora"):
        assert f"| {use} | yes |" in card
        with refused(f"{use} was True in the run to resume and is False now"):
            fine_tune(tmp_path, **settings | {use: False}, max_steps=2, output_dir=run, resume="latest")


def test_a_record_of_a_later_form_is_refused(tmp_path: Path) -> None:
    adapter = fine_tune(tmp_path, lora_r=2, max_steps=1) / "adapter"
    record = json.loads((adapter / "falcon_qlora.json").read_text())
    assert record.pop("format") == 1
    (adapter / "falcon_qlora.json").write_text(json.dumps(record))
    falcon_qlora.load_adapter(adapter)
    (adapter / "falcon_qlora.json").write_text(json.dumps({**record, "format": 2}))
    with refused("falcon_qlora.json: format 2 is newer than this falcon_qlora reads; update it"):
        falcon_qlora.load_adapter(adapter)
