"""``falcon-qlora generate --adapter DIR --prompt TEXT``: answers from a quantized base and its adapter.

The adapter's folder says which base model, quantization and prompt template it was trained with; flags say
otherwise. Without an adapter the base model answers alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.config import Configuration, parse
from falcon_qlora.errors import UserError

if TYPE_CHECKING:
    from falcon_qlora.data.templates import Template, Turn

RECORD = "falcon_qlora.json"


@dataclass(kw_only=True)
class GenerateArguments:
    """What to answer, and how."""

    _argument_group_name = "Generation"

    adapter: str | None = field(
        default=None, metadata={"help": "Folder of a trained adapter, or of its run."}
    )
    prompt: list[str] | None = field(
        default=None, metadata={"help": "What to answer, one or several; unset: read from standard input."}
    )
    chat: bool = field(default=False, metadata={"help": "Talk in turns; an empty line or Ctrl-D ends it."})
    compare: bool = field(default=False, metadata={"help": "Answer without the adapter first, then with it."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(
        default=0.0, metadata={"help": "0: the likeliest token each time; above 0: draw."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Draw from the likeliest tokens that together have this probability."}
    )


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    configuration = parse(
        argv,
        extra_arguments=GenerateArguments,
        program="falcon-qlora generate",
        description="Answer prompts with a quantized Falcon and a trained adapter.",
    )
    wanted: GenerateArguments = configuration.extra
    _check(wanted)
    folder = _adapter_folder(wanted.adapter) if wanted.adapter else None
    record = _read_record(folder) if folder else {}

    # Only now: a wrong flag is told at once.
    from falcon_qlora.quiet import quiet_libraries

    quiet_libraries()
    template = _template(configuration, record)
    speaker = _Speaker(*_load(configuration, folder, record), template, wanted, configuration.run.seed)
    if wanted.chat:
        speaker.chat()
        return 0
    prompts = wanted.prompt if wanted.prompt else [sys.stdin.read().rstrip("\n")]
    for prompt in prompts:
        speaker.answer(prompt, named=len(prompts) > 1 or wanted.compare)
    return 0


class _Speaker:
    """A loaded model, and how it is spoken to."""

    def __init__(self, model: Any, tokenizer: Any, template: Template, wanted: GenerateArguments, seed: int):
        self.model, self.tokenizer, self.template, self.wanted, self.seed = (
            model,
            tokenizer,
            template,
            wanted,
            seed,
        )

    def answer(self, prompt: str, *, named: bool) -> None:
        """Print the answer to one prompt as it comes; `named` says before it what is asked and who answers."""
        from falcon_qlora.data.templates import Turn

        ids = prompt_ids(self.template, [Turn("user", prompt)], self.tokenizer)
        if named:
            print(f"\n> {prompt}")
        if self.wanted.compare:
            with self.model.disable_adapter():
                self._print("base:    ", ids)
            self._print("adapter: ", ids)
        else:
            self._print("", ids)

    def chat(self) -> None:
        """Answer line after line, each with all turns before it."""
        from falcon_qlora.data.templates import Turn

        turns: list[Turn] = []
        while True:
            try:
                said = input("you: " if sys.stdin.isatty() else "")
            except EOFError:
                said = ""
            if not said.strip():
                return
            turns.append(Turn("user", said))
            text = self._print("falcon: ", prompt_ids(self.template, turns, self.tokenizer))
            turns.append(Turn("assistant", text))

    def _print(self, name: str, ids: list[int]) -> str:
        print(name, end="", flush=True)
        text = ""
        for piece in self._pieces(ids):
            # The space that a template leaves between its marker and the answer is not for reading.
            shown = piece if text.strip() else piece.lstrip()
            print(shown, end="", flush=True)
            text += piece
        print(flush=True)
        return text.strip()

    def _pieces(self, ids: list[int]) -> Iterator[str]:
        from falcon_qlora.generation import generate_stream

        return generate_stream(
            self.model,
            self.tokenizer,
            ids,
            max_new_tokens=self.wanted.max_new_tokens,
            temperature=self.wanted.temperature,
            top_p=self.wanted.top_p,
            seed=self.seed,
        )


def prompt_ids(template: Template, turns: list[Turn], tokenizer: Any) -> list[int]:
    """Token ids of a conversation up to where the next answer begins, as in training: an end token after each answer."""
    text, ids, position = template.prompt(turns), [], 0
    done = 0
    for segment in template.segments(turns):
        position += len(segment.text)
        if segment.end:
            ids += [
                *tokenizer(text[done:position], add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ]
            done = position
    return ids + tokenizer(text[done:], add_special_tokens=False)["input_ids"]


def _check(wanted: GenerateArguments) -> None:
    if wanted.chat and (wanted.prompt or wanted.compare):
        raise UserError("--chat asks for its own prompts: leave out --prompt and --compare")
    if wanted.compare and not wanted.adapter:
        raise UserError("--compare needs --adapter: it answers without the adapter and with it")
    if wanted.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {wanted.max_new_tokens}: must be at least 1")
    if wanted.temperature < 0:
        raise UserError(f"--temperature {wanted.temperature}: must not be negative")
    if not 0 < wanted.top_p <= 1:
        raise UserError(f"--top_p {wanted.top_p}: must be above 0 and at most 1")


def _adapter_folder(name: str) -> Path:
    """The adapter's own folder: `name`, or ``adapter`` inside it where `name` is a run directory."""
    for folder in (Path(name), Path(name) / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise UserError(
        f"--adapter {name}: no adapter there (no adapter_config.json in it or in its folder adapter/)"
    )


def _read_record(folder: Path) -> dict[str, Any]:
    """How the adapter was trained; adapters from elsewhere have no record, only the name of their base."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        file = folder / RECORD
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--adapter {folder}: its settings are not valid JSON: {error}") from None
    record.setdefault("base_model", base.get("base_model_name_or_path"))
    return record


def _template(configuration: Configuration, record: dict[str, Any]) -> Template:
    """The template that a flag names, else the adapter's; a base model alone goes on from the prompt as it is."""
    from falcon_qlora.data.formats import resolve_template
    from falcon_qlora.data.templates import get_template

    data, explicit = configuration.data, configuration.explicit
    dataset_format = (
        data.dataset_format if "dataset_format" in explicit else record.get("dataset_format", "auto")
    )
    name = data.template if "template" in explicit else record.get("template", "auto")
    if name == "auto":
        name = "none" if dataset_format == "auto" else resolve_template("auto", dataset_format)
    return get_template(name)


def _load(configuration: Configuration, folder: Path | None, record: dict[str, Any]) -> tuple[Any, Any]:
    """The model in evaluation mode, the adapter on it where there is one, and the tokenizer."""
    from falcon_qlora.methods.lora import load_adapter
    from falcon_qlora.models import load

    settings, explicit = configuration.model, configuration.explicit

    def setting(field_name: str, recorded: str) -> Any:
        value = getattr(settings, field_name)
        return value if field_name in explicit else record.get(recorded) or value

    name = setting("model_name_or_path", "base_model")
    double = record.get("double_quantization", settings.double_quantization)
    model = load.load_model(
        name,
        quantize_mode=setting("quantize_mode", "quantize_mode"),
        compute_dtype=settings.compute_dtype,
        double_quantization=settings.double_quantization if "double_quantization" in explicit else double,
        norms_in_float32=settings.norms_in_float32,
        llm_int8_threshold=settings.llm_int8_threshold,
        revision=settings.model_revision,
    )
    if folder is None:
        return model.eval(), load.load_tokenizer(name, revision=settings.model_revision)
    return load_adapter(folder, base_model=model).eval(), load.load_tokenizer(
        name, revision=settings.model_revision
    )
