"""Make a merge, measure it, and keep it only if it stays within the limits on loss and KL divergence."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import sha256, write_json, write_text
from falcon_qlora.common.record_files import CERTIFICATE
from falcon_qlora.data.packing import MicroBatch
from falcon_qlora.inference.evaluation import (
    Predictions,
    divergence,
    folder_predictions,
    mean_loss,
    token_losses,
)
from falcon_qlora.merge.certificate import FORMAT, Certificate, ChooseBy, HeldOut, Measured, Origin, card
from falcon_qlora.merge.out import new_folder
from falcon_qlora.merge.tensors import Onto, merged_tensors
from falcon_qlora.methods.adapter_folder import SavedAdapter
from falcon_qlora.models.checkpoints import Checkpoint
from falcon_qlora.models.folder import (
    DTYPES,
    altered_tensors,
    copy_tokenizer,
    parameter_shapes,
    write_configuration,
    write_generation_config,
)
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.quantize import QuantizeMode
from falcon_qlora.models.tensor_files import write_model


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to merge, and how.

    Attributes:
        checkpoint: the base model: the original, where that is known of a quantized checkpoint.
        revision: of it on the hub.
        quantized: the checkpoint that the adapter is opened on, if that is a quantized one.
        base_folder: the base's folder; None for random weights.
        tokenizer_folder: the folder whose tokenizer files are copied.
        adapter: already checked against the base.
        quantize_mode, double_quantization, compute_dtype: of the base while the adapter was trained.
        candidates: the bases to merge onto; the better merge is kept.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        max_shard_bytes: largest size of a weights file.
        max_loss_increase: limit for a merge to be kept, nats per token.
        max_kl_divergence: likewise.
        choose_by: the figure that the merge to keep has lower; the loss on text that is not like what was
            trained on says little.
        device: where the merge is computed.
    """

    checkpoint: Checkpoint
    revision: str | None
    quantized: Checkpoint | None
    base_folder: Path | None
    tokenizer_folder: Path
    adapter: SavedAdapter
    quantize_mode: QuantizeMode
    double_quantization: bool
    compute_dtype: torch.dtype
    candidates: Sequence[Onto]
    dtype: str
    max_shard_bytes: int
    max_loss_increase: float
    max_kl_divergence: float
    choose_by: ChooseBy
    device: torch.device

    @property
    def config(self) -> PreTrainedConfig:
        """The merged model's configuration."""
        base = self.checkpoint.config
        size = self.adapter.method.vocab_size(base)
        if size == base.vocab_size:
            return base
        config = copy.deepcopy(base)
        config.vocab_size = size
        return config


def needed_bytes(request: Request) -> int:
    """Bytes needed on disk: all candidates are kept until the better one is known."""
    numbers = sum(torch.Size(shape).numel() for shape in parameter_shapes(request.config).values())
    return len(request.candidates) * numbers * DTYPES[request.dtype].itemsize


def merge(
    request: Request,
    out: Path,
    *,
    overwrite: bool,
    origin: Origin,
    held_out: HeldOut,
    batches: Sequence[MicroBatch],
    reference: Predictions,
    say: Callable[[str], None],
) -> Certificate:
    """Write the merge with its certificate and card to `out`, completely or not at all.

    Args:
        request: what to merge.
        out: the folder.
        overwrite: replace it if it exists.
        origin: for the certificate.
        held_out: describes `batches`.
        batches: the text to measure on.
        reference: predictions of the quantized base with its adapter on `batches`, answers only.
        say: takes what is being done.

    Raises:
        UserError: if no merge is within the limits, or another process has made `out` meanwhile; then nothing
            is kept.
    """
    adapter_loss = mean_loss(token_losses(reference))
    with new_folder(out, overwrite=overwrite) as folder:
        measured: dict[Onto, Measured] = {}
        hashes: dict[Onto, dict[str, str]] = {}
        for onto in request.candidates:
            (folder / onto).mkdir()
            merging = _per_block(request, say, f"merging onto {onto}")
            hashes[onto] = _write(request, folder / onto, onto, merging)
            predicted = folder_predictions(
                folder / onto,
                batches,
                answers_only=True,
                device=request.device,
                dtype=request.compute_dtype,
                at_block=_per_block(request, say, f"measuring the merge onto {onto}"),
            )
            loss = mean_loss(token_losses(predicted))
            measured[onto] = Measured(
                loss=loss, loss_increase=loss - adapter_loss, **divergence(reference, predicted)
            )
            say(f"reading the merge onto {onto} back")
            # Catches a disk that does not store what was computed.
            for name in altered_tensors(folder / onto, request.config, hashes[onto]):
                raise UserError(f"{name} reads back differently than it was written; is the disk failing?")
        best = _choose(request, measured, adapter_loss)
        for file in (folder / best).iterdir():
            file.rename(folder / file.name)
        for onto in request.candidates:
            shutil.rmtree(folder / onto)
        certificate = Certificate(
            merged_onto=best,
            dtype=request.dtype,
            origin=origin,
            held_out=held_out,
            adapter_loss=adapter_loss,
            merges=measured,
            chosen_by=request.choose_by,
            max_loss_increase=request.max_loss_increase,
            max_kl_divergence=request.max_kl_divergence,
            tensors=hashes[best],
            files={
                file.name: sha256(file) for file in sorted(folder.iterdir()) if file.suffix != ".safetensors"
            },
        )
        write_json(folder / CERTIFICATE, {"format": FORMAT, **asdict(certificate)})
        write_text(folder / "README.md", card(certificate))
    return certificate


def _per_block(request: Request, say: Callable[[str], None], doing: str) -> Callable[[int], None]:
    blocks = request.config.num_hidden_layers
    return lambda index: say(f"{doing}: block {index + 1} of {blocks}")


def _telling(
    tensors: Iterable[tuple[str, Tensor]], config: PreTrainedConfig, at_block: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    layout = layout_of(config)
    blocks = f"{layout.backbone}.{layout.blocks}."
    for name, tensor in tensors:
        if name.startswith(blocks):
            at_block(int(name.removeprefix(blocks).partition(".")[0]))
        yield name, tensor


def _write(request: Request, folder: Path, onto: Onto, at_block: Callable[[int], None]) -> dict[str, str]:
    config, dtype = request.config, DTYPES[request.dtype]
    tensors = merged_tensors(
        request.checkpoint if onto == "16bit" else request.quantized or request.checkpoint,
        request.adapter,
        onto=onto,
        quantize_mode=request.quantize_mode,
        double_quantization=request.double_quantization,
        compute_dtype=request.compute_dtype,
        device=request.device,
    )
    hashes = write_model(
        folder,
        parameter_shapes(config),
        _telling(tensors, config, at_block),
        dtype=dtype,
        max_shard_bytes=request.max_shard_bytes,
    )
    write_configuration(folder, config, dtype)
    write_generation_config(folder, config, request.base_folder)
    copy_tokenizer(folder, request.tokenizer_folder)
    return hashes


def _choose(request: Request, measured: dict[Onto, Measured], adapter_loss: float) -> Onto:
    """The merge with the lowest `choose_by` among those within the limits.

    Raises:
        UserError: if there is none.
    """
    # Written so that a non-finite value fails.
    within = [
        onto
        for onto, each in measured.items()
        if each.loss_increase <= request.max_loss_increase and each.kl_divergence <= request.max_kl_divergence
    ]
    if within:
        return min(within, key=lambda onto: getattr(measured[onto], request.choose_by))
    told = "; ".join(
        f"onto the {onto} base loss {each.loss:.4f} ({each.loss_increase:+.4f}), KL divergence "
        f"{each.kl_divergence:.4f}"
        for onto, each in measured.items()
    )
    raise UserError(
        f"The merge is worse than the adapter, whose loss on the held-out text is {adapter_loss:.4f}: {told}."
        f" Allowed are --max_loss_increase {request.max_loss_increase:g} and --max_kl_divergence "
        f"{request.max_kl_divergence:g}. Nothing was kept. {_advice(request, measured)}"
    )


def _advice(request: Request, measured: Mapping[Onto, Measured]) -> str:
    """What has not been tried."""
    bases: set[Onto] = {"16bit", "dequantized"}
    bases -= measured.keys()
    if request.quantize_mode == "16bit" or request.checkpoint.scheme is not None:
        bases = set()  # both are the same, or the original is not known
    ways = [f"--base {each}" for each in sorted(bases)] + ["--dtype fp32"] * (request.dtype != "fp32")
    return f"Try {', or '.join(ways)}" if ways else "Every other way was tried: allow more by these flags"
