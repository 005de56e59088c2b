"""The README.md of a merged model."""

from __future__ import annotations

from typing import Any

import yaml

from falcon_qlora.merge.certificate import Certificate
from falcon_qlora.merge.folder import DTYPES
from falcon_qlora.run_folder.model_card import names_hub_dataset, names_hub_model, table
from falcon_qlora.terminal.tables import markdown_table

_ONTO = {"16bit": "the original 16-bit base", "dequantized": "what the quantized base stands for"}


def render(certificate: Certificate) -> str:
    """The card: the hub's metadata as front matter, then Markdown."""
    front = yaml.safe_dump(_metadata(certificate), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{front}---\n",
        _introduction(certificate),
        _usage(certificate),
        _proof(certificate),
        table("Made of", "", _origin(certificate)),
        table("Settings of the training", "setting", certificate.origin.settings),
    ]
    return "\n".join(section for section in sections if section)


def _metadata(certificate: Certificate) -> dict[str, Any]:
    origin = certificate.origin
    # What the base allows holds for what was made of it; "other" sends the reader there.
    metadata: dict[str, Any] = {
        "license": origin.licence or "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    if names_hub_model(origin.base_model):
        metadata |= {"base_model": origin.base_model, "base_model_relation": "finetune"}
    on_hub = [name for name in origin.datasets if names_hub_dataset(name)]
    if on_hub:
        metadata["datasets"] = on_hub
    return metadata | {"tags": ["falcon", "lora", "qlora", "falcon-qlora"]}


def _introduction(certificate: Certificate) -> str:
    origin = certificate.origin
    text = (
        f"# {origin.base_model}, fine-tuned\n\nA LoRA adapter merged onto {_ONTO[certificate.merged_onto]} "
        f"of `{origin.base_model}`, stored in {certificate.dtype}, with falcon_qlora "
        f"{origin.falcon_qlora}. The adapter was trained on the base held in {origin.quantization}.\n"
    )
    if origin.base_model.startswith("random:"):
        text += "\n**The base model's weights are random**: this is a test of the machinery.\n"
    if origin.licence is None:
        text += "\nThe base model's licence holds; it could not be read here.\n"
    return text


def _usage(certificate: Certificate) -> str:
    dtype = str(DTYPES[certificate.dtype]).removeprefix("torch.")
    text = (
        "## Use\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="{dtype}")\n'
        'tokenizer = AutoTokenizer.from_pretrained("MODEL")\n```\n\n'
        "```\nvllm serve MODEL\npython convert_hf_to_gguf.py MODEL    # llama.cpp\n```\n"
    )
    if certificate.origin.template:
        text += f"\nIt was trained with the prompt template `{certificate.origin.template}`.\n"
    return text


def _proof(certificate: Certificate) -> str:
    held_out = certificate.held_out
    rows = [["quantized base and adapter", f"{certificate.adapter_loss:.4f}"]]
    for onto, measured in certificate.merges.items():
        kept = " (this one)" if onto == certificate.merged_onto else ""
        losses = [f"{measured.loss:.4f}", f"{measured.loss_increase:+.4f}"]
        distances = [f"{measured.kl_divergence:.5f}", f"{100 * measured.same_top_token:.1f} %"]
        rows.append([f"merged onto {_ONTO[onto]}{kept}", *losses, *distances])
    titles = ["", "loss", "more than the adapter", "KL divergence", "same likeliest token"]
    measured_on = (
        f"Measured on {held_out.target_tokens:,} tokens of {held_out.source}; see `certificate.json`."
    )
    return "\n".join(["## What the merge did\n", measured_on, "", *markdown_table(titles, rows), ""])


def _origin(certificate: Certificate) -> dict[str, Any]:
    origin = certificate.origin
    rows = {
        "base model": origin.base_model,
        "layout": origin.base_layout,
        "revision": origin.base_revision,
        "commit": origin.base_commit,
        "licence": origin.licence,
        "data": ", ".join(origin.datasets),
        "hash of the tokenized data": origin.data_fingerprint,
        "template": origin.template,
        **{f"adapter: {name}": value for name, value in origin.adapter.items()},
    }
    return {label: value for label, value in rows.items() if value not in (None, "")}
