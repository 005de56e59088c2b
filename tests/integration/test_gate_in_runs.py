"""A save that is not what is in memory ends the run: what was good before it stays, and that is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from falcon_qlora.checkpoint.manifest import fault
from falcon_qlora.common.errors import UserError
from falcon_qlora.methods.adapter_v2 import AdapterV2
from falcon_qlora.methods.lora import Lora
from tests.integration.interrupted import assert_same_run
from tests.integration.test_adapter import fine_tune

METHODS: dict[str, Any] = {"lora": Lora, "adapter_v2": AdapterV2}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (".step-2.partial", r"opened again, scales \S+ by 0.5, the model in memory by 0.25\."),
        (".step-4.partial", r"opened again, scales \S+ by 0.5, the model in memory by 0.25\."),
        (".adapter-partial-", "opened again, has loss"),
    ],
)
def test_settings_that_are_not_the_models_are_found_at_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, told: str
) -> None:
    """LoRA's scale is in no tensor: only what the adapter computes tells that it is another."""
    real = Lora.save

    def save(self: Any, model: Any, folder: Path, *state: Any) -> None:
        real(self, model, folder, *state)
        if folder.name.startswith(wrong):
            file = folder / "adapter_config.json"
            settings = json.loads(file.read_text())
            file.write_text(json.dumps({**settings, "lora_alpha": settings["lora_alpha"] * 2}))

    monkeypatch.setattr(Lora, "save", save)
    with pytest.raises(UserError, match=rf"was not kept: .*{told}") as refusal:
        fine_tune(tmp_path, output_dir=tmp_path / "run", max_steps=4, save_steps=2)
    last = {".step-2.partial": None, ".step-4.partial": 2}.get(wrong, 4)
    told = f"last complete checkpoint is {tmp_path}/run/checkpoints/step-{last}"
    assert ("There is no complete checkpoint" if last is None else told) in str(refusal.value)


def test_a_run_that_saves_is_the_run_that_does_not(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "logging_steps": 1, "lora_dropout": 0.3}
    for name, saving in {"often": {"save_steps": 1}, "never": {"save_strategy": "no"}}.items():
        fine_tune(tmp_path, output_dir=tmp_path / name, **settings, **saving)
    assert_same_run(tmp_path / "often", tmp_path / "never")


@pytest.mark.parametrize(
    ("method", "damaged", "left"),
    [
        ("lora", ".step-2.partial", []),
        ("lora", ".step-4.partial", ["step-2"]),
        ("lora", ".adapter-partial-", ["step-2", "step-4"]),
        ("adapter_v2", ".step-4.partial", ["step-2"]),
    ],
)
def test_a_save_that_is_not_what_is_in_memory_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, damaged: str, left: list[str]
) -> None:
    real = METHODS[method].save

    def save(self: Any, model: Any, folder: Path, *state: Any) -> None:
        real(self, model, folder, *state)
        if folder.name.startswith(damaged):
            tensors = load_file(folder / "adapter_model.safetensors")
            next(reversed(tensors.values())).view(-1)[-1:].add_(1e-6)
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(METHODS[method], "save", save)
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"was not kept: .*is not what the model in memory has") as refusal:
        fine_tune(tmp_path, output_dir=run, max_steps=4, save_steps=2, method=method)
    assert (f"last complete checkpoint is {run}/checkpoints/{left[-1]}" if left else "There is no") in str(
        refusal.value
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == left
    assert not [fault(run / "checkpoints" / name) for name in left if fault(run / "checkpoints" / name)]
    assert not (run / "adapter").exists()
    assert not (run / "summary.json").exists()
