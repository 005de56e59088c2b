"""Sample answers before, during and after training, so that a person sees what the loss means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from falcon_qlora.inference.generation import generate_batch
from falcon_qlora.models.sharded_base import alone
from falcon_qlora.run_folder.directory import Backlog, append_lines
from falcon_qlora.terminal.console import print_answers

_MOST_NEW_TOKENS = 48  # of one answer


class SampleAnswers(TrainerCallback):
    """Has the model answer a few prompts before training, at each evaluation, and at the end.

    The main process answers, greedily, while the others wait for it in the next step.

    Args:
        prompts: pairs of what to show and the token ids to continue.
        tokenizer: turns the answers into text.
        file: a JSON Lines file that gets every answer.
    """

    def __init__(self, prompts: list[tuple[str, list[int]]], tokenizer: Any, file: Path):
        self._prompts, self._tokenizer, self._file = prompts, tokenizer, file
        self._append = Backlog(append_lines, file.name)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:  # a resumed run has answered already
            self._answer("before training", state, kwargs["model"])

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps:
            self._answer(f"at step {state.global_step}", state, kwargs["model"])

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._answer("after training", state, kwargs["model"])

    def _answer(self, title: str, state: TrainerState, model: Any) -> None:
        asked = [ids for _, ids in self._prompts]
        answers = alone(
            model, lambda: generate_batch(model, self._tokenizer, asked, max_new_tokens=_MOST_NEW_TOKENS)
        )
        if answers is None:
            return
        shown = [(prompt, answer) for (prompt, _), answer in zip(self._prompts, answers, strict=True)]
        print_answers(title, shown)
        records = [
            {"step": state.global_step, "prompt": prompt, "answer": answer} for prompt, answer in shown
        ]
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._append(self._file, "".join(lines))
