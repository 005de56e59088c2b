"""Every Triton kernel at Falcon's sizes: is it right, and how near to the memory's speed is it?

    python tests/benchmarks/kernels.py
    python tests/benchmarks/kernels.py --tune

Prints a Markdown table. A kernel's error and that of PyTorch's own operation are the largest distances to the
reference in float64, relative to its largest value (NF4: to bitsandbytes' bits). Times are medians with the
L2 cache cleared; the bytes are those that have to move. `--tune` times what else the launchers could choose.
Without a GPU `--tiny --tokens 9` tries the script in Triton's interpreter. That cuts bfloat16 off where GPUs
round: errors are twice as large there, and NF4's bits are others.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton

from falcon_qlora.kernels import (
    convolution_triton,
    gate_triton,
    gelu,
    layer_norm,
    nf4,
    ops,
    rms_norm,
    rotary,
    ssd,
    ssd_ops,
    ssd_triton,
    swiglu,
)
from falcon_qlora.kernels.chunks import FAST_SSD_TOKENS
from falcon_qlora.models.packed_attention import Sequences
from falcon_qlora.models.quantize import bnb

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COPY_BYTES_A_SECOND = 4.27e12  # an H200's, measured with copies
EPS = 1e-5
ROWS = 1024  # rows that are compared at a time, in float64


@dataclass(frozen=True)
class Sizes:
    name: str
    hidden: int
    wide: int
    kv_heads: int
    group: int
    head_dim: int = 64
    keys: int = 1  # of a group


@dataclass(frozen=True)
class StateSpaceSizes:
    """The letters are `ssd`'s."""

    name: str
    heads: int  # M
    head_size: int  # P
    state: int  # N


MODELS = (
    Sizes("7B", 4544, 18176, 1, 73),
    Sizes("40B", 8192, 32768, 8, 18),
    Sizes("Falcon3-7B", 3072, 23040, 1, 20, 256, keys=4),
    StateSpaceSizes("Falcon-H1-7B", 24, 128, 256),
)
TINY = (
    Sizes("tiny", 192, 768, 2, 5),
    Sizes("tiny Falcon3", 192, 256, 1, 8, keys=2),
    StateSpaceSizes("tiny Falcon-H1", 2, 16, 32),
)
DOCUMENT = 512  # tokens of each, of a state space; ROWS is a multiple


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        ours: launches the kernel and returns its results.
        theirs: the same by PyTorch's or bitsandbytes' own operations.
        reference: results in float64, or None where ours must have the bits of theirs.
        bytes: that have to be read or written.
        tunables: a module's constants and the values to try.
    """

    name: str
    ours: Callable[[], tuple[Tensor, ...]]
    theirs: Callable[[], tuple[Tensor, ...]]
    reference: Callable[[], tuple[Tensor, ...]] | None
    bytes: float
    module: ModuleType
    tunables: dict[str, list[Any]]


def nf4_cases(sizes: Sizes) -> Iterator[Case]:
    shape = (sizes.wide, sizes.hidden)
    weight = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    kinds = (
        (True, "nf4"),
        (True, "nf4, rows apart"),
        (True, "nf4, transposed"),
        (False, "nf4, plain scales"),
    )
    for nested, name in kinds:
        packed, state = bnb.functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        transpose = "transposed" in name
        rows, columns = shape[::-1] if transpose else shape
        buffer = torch.empty(rows, columns + 128 * ("apart" in name), device=DEVICE, dtype=torch.bfloat16)
        out = buffer[:, :columns]
        tunables: dict[str, list[Any]] = {"_WORDS_A_PROGRAM": [256, 512, 1024, 2048], "_WARPS": [2, 4, 8]}
        if transpose:
            tunables = {"_TILE_ROWS": [64, 128], "_TILE_WORDS": [8, 16], "_WARPS": [4, 8]}

        def ours(packed=packed, state=state, out=out, transpose=transpose):
            return (nf4.dequantize_nf4(packed, state, out, transpose=transpose),)

        def theirs(packed=packed, state=state, transpose=transpose):
            plain = bnb.functional.dequantize_4bit(packed, state)
            return (plain.T.contiguous() if transpose else plain,)

        scales = 1 / 64 if nested else 4 / 64
        moved = weight.numel() * (0.5 + 2 + scales)
        yield Case(f"{name} [{rows}, {columns}]", ours, theirs, None, moved, nf4, tunables)


def norm_cases(sizes: Sizes, tokens: int) -> Iterator[Case]:
    hidden = (sizes.hidden,)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    x, add, grads = make(tokens, *hidden), make(tokens, *hidden), [make(tokens, *hidden) for _ in range(2)]
    norms = [(make(*hidden), make(*hidden)) for _ in range(2)]
    _, mean, rstd = layer_norm.layer_norm(x, *norms[0], EPS)
    _, their_mean, their_rstd = torch.native_layer_norm(x, hidden, *norms[0], EPS)
    weights = [weight for weight, _ in norms]

    def forward_theirs(count: int) -> tuple[Tensor, ...]:
        return tuple(F.layer_norm(x, hidden, *norm, EPS) for norm in norms[:count])

    def backward_theirs(count: int) -> tuple[Tensor, ...]:
        dx = add
        for grad, (weight, _) in zip(grads[:count], norms, strict=False):
            dx = (
                dx
                + torch.ops.aten.native_layer_norm_backward(
                    grad, x, hidden, their_mean, their_rstd, weight, None, [True, False, False]
                )[0]
            )
        return (dx,)

    def forward_reference(count: int) -> tuple[Tensor, ...]:
        wide = x[:ROWS].double()
        return tuple(F.layer_norm(wide, hidden, w.double(), b.double(), EPS) for w, b in norms[:count])

    def backward_reference(count: int) -> tuple[Tensor, ...]:
        wide = x[:ROWS].double().requires_grad_()
        results = [F.layer_norm(wide, hidden, w.double(), b.double(), EPS) for w, b in norms[:count]]
        (dx,) = torch.autograd.grad(results, wide, [grad[:ROWS].double() for grad in grads[:count]])
        return (dx + add[:ROWS].double(),)

    forward: dict[int, Callable[[], tuple[Tensor, ...]]] = {
        n: lambda n=n: tuple(layer_norm.layer_norms(x, norms[:n], EPS)[0]) for n in (1, 2)
    }
    backward: dict[int, Callable[[], tuple[Tensor, ...]]] = {
        n: lambda n=n: (layer_norm.layer_norms_backward(x, grads[:n], mean, rstd, weights[:n], add),)
        for n in (1, 2)
    }
    lanes = [{"forward": n, "backward": n} for n in (8, 16, 32)]
    for count, one in ((1, "norm"), (2, "two norms")):
        shape = f"[{tokens}, {sizes.hidden}]"
        yield Case(
            f"{one} {shape}", forward[count], lambda n=count: forward_theirs(n),
            lambda n=count: forward_reference(n), 2 * x.numel() * (1 + count),
            layer_norm, {"_LANES_A_THREAD": lanes},
        )  # fmt: skip
        yield Case(
            f"{one}, backward {shape}", backward[count], lambda n=count: backward_theirs(n),
            lambda n=count: backward_reference(n), 2 * x.numel() * (3 + count),
            layer_norm, {"_LANES_A_THREAD": lanes},
        )  # fmt: skip


def rotary_cases(sizes: Sizes, tokens: int) -> Iterator[Case]:
    kv_heads, group, head_dim = sizes.kv_heads, sizes.group, sizes.head_dim
    shape = (tokens, kv_heads, group, head_dim)
    # As in training: the projection of the feed-forward layer lies beside it.
    buffer = torch.randn(tokens, kv_heads * group * head_dim + 256, device=DEVICE, dtype=torch.bfloat16)
    fused = buffer[:, :-256].unflatten(1, shape[1:])
    positions = torch.arange(tokens, device=DEVICE)[:, None] % 512
    angles = positions * 10000 ** (-torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    angles = torch.cat([angles, angles], dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    halves = cosine.bfloat16()[:, None], sine.bfloat16()[:, None]
    target = fused.clone()

    def apart(heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return heads[:, :, :-2].flatten(1, 2), heads[:, :, -2], heads[:, :, -1]

    parts = tuple(part.contiguous() for part in apart(fused))

    def turned(heads: Tensor, sign: int = 1) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * halves[0] + torch.cat([-second, first], dim=-1) * (sign * halves[1])

    def join_theirs() -> tuple[Tensor, ...]:
        query, key, value = parts
        query = turned(query, -1).unflatten(1, (kv_heads, -1))
        back = torch.cat([query, turned(key, -1).unsqueeze(2), value.unsqueeze(2)], dim=2)
        return (back,)

    def back(heads: Tensor) -> Tensor:
        """Rotated back, in float64."""
        first, second = heads[:ROWS].double().chunk(2, dim=-1)
        c, s = (each[:ROWS, None, : head_dim // 2].double() for each in (cosine, sine))
        return torch.cat([first * c + second * s, second * c - first * s], dim=-1)

    def join_reference() -> tuple[Tensor, ...]:
        query, key, value = parts
        query = back(query).unflatten(1, (kv_heads, -1))
        return (torch.cat([query, back(key).unsqueeze(2), value[:ROWS].double().unsqueeze(2)], dim=2),)

    def in_place() -> tuple[Tensor, ...]:
        return (rotary.rotate_(target[:, :, :-1], cosine, sine),)

    def in_place_theirs() -> tuple[Tensor, ...]:
        query, key, _ = apart(fused)
        return turned(query), turned(key)

    shown = f"[{tokens}, {kv_heads}, {group}, {head_dim}]"
    moved = 4 * fused.numel() + 4 * cosine.numel()  # half of the cosines and sines, in float32
    tunables: dict[str, list[Any]] = {
        "_TOKENS_A_PROGRAM": [4, 8, 16], "_HEADS_A_PROGRAM": [8], "_WARPS": [2, 4, 8],
    }  # fmt: skip
    out = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16)
    yield Case(f"rotate, join {shown}", lambda: (rotary.rotate_join(*parts, cosine, sine, out),), join_theirs,
               join_reference, moved, rotary, tunables)  # fmt: skip
    # Its results change with every call: right where the other is, as they share the kernel.
    yield Case(f"rotate in place {shown}", in_place, in_place_theirs, tuple, moved * (1 - 1 / group), rotary,
               tunables)  # fmt: skip


def gelu_cases(sizes: Sizes, tokens: int) -> Iterator[Case]:
    x, grad, output, dx = (
        torch.randn(tokens, sizes.wide, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)
    )

    def backward_theirs() -> tuple[Tensor, ...]:
        return torch.ops.aten.gelu_backward(grad, x), F.gelu(x)

    def wide() -> tuple[Tensor, Tensor]:
        return grad[:ROWS].double(), x[:ROWS].double()

    shape = f"[{tokens}, {sizes.wide}]"
    tunables = {"_BLOCK": [1024, 2048, 4096], "_WARPS": [4, 8]}
    yield Case(
        f"gelu {shape}", lambda: (gelu.gelu(x, output),), lambda: (F.gelu(x),),
        lambda: (F.gelu(wide()[1]),), 4 * x.numel(), gelu, tunables,
    )  # fmt: skip
    yield Case(
        f"gelu, backward {shape}", lambda: gelu.gelu_backward(grad, x, dx, output=output), backward_theirs,
        lambda: (torch.ops.aten.gelu_backward(*wide()), F.gelu(wide()[1])),
        8 * x.numel(), gelu, tunables,
    )  # fmt: skip


def sequential_cases(sizes: Sizes, tokens: int) -> Iterator[Case]:
    """What Falcon3's blocks have instead of layer norms, GELU and fused heads."""

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    (x, grad, add), weight = make(3, tokens, sizes.hidden), make(sizes.hidden)
    out, (_, rstd), shape = torch.empty_like(x), rms_norm.rms_norm(x, weight, EPS), x.shape[1:]

    def backward(of_y: Tensor, x: Tensor, weight: Tensor, add: Tensor) -> tuple[Tensor]:
        leaf = x.detach().requires_grad_()
        return (torch.autograd.grad(F.rms_norm(leaf, shape, weight, EPS), leaf, of_y)[0] + add,)

    shown = f"[{tokens}, {sizes.hidden}]"
    yield Case(
        f"RMS norm {shown}", lambda: rms_norm.rms_norm(x, weight, EPS, out)[:1],
        lambda: (F.rms_norm(x, shape, weight, EPS),),
        lambda: (F.rms_norm(x[:ROWS].double(), shape, weight.double(), EPS),), 4 * x.numel(), layer_norm, {},
    )  # fmt: skip
    yield Case(
        f"RMS norm, backward {shown}",
        lambda: (rms_norm.rms_norm_backward(grad, x, rstd, weight, add, out),),
        lambda: backward(grad, x, weight, add),
        lambda: backward(grad[:ROWS].double(), x[:ROWS].double(), weight.double(), add[:ROWS].double()),
        8 * x.numel(), layer_norm, {},
    )  # fmt: skip

    gate_up, of_y, y = make(tokens, 2 * sizes.wide), make(tokens, sizes.wide), make(tokens, sizes.wide)
    of_gate_up, again = torch.empty_like(gate_up), of_y.clone()  # which the kernel overwrites

    def by_torch(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * up

    def back(gate_up: Tensor, of_y: Tensor) -> tuple[Tensor, Tensor]:
        leaf = gate_up.detach().requires_grad_()
        output = by_torch(leaf)
        return torch.autograd.grad(output, leaf, of_y)[0], output.detach()

    shown, tunables = f"[{tokens}, {sizes.wide}]", {"_BLOCK": [1024, 2048, 4096], "_WARPS": [4, 8]}
    yield Case(
        f"SwiGLU {shown}", lambda: (swiglu.swiglu(gate_up, y),), lambda: (by_torch(gate_up),),
        lambda: (by_torch(gate_up[:ROWS].double()),), 6 * y.numel(), swiglu, tunables,
    )  # fmt: skip
    yield Case(
        f"SwiGLU, backward {shown}", lambda: swiglu.swiglu_backward(again, gate_up, of_gate_up),
        lambda: back(gate_up, of_y), lambda: back(gate_up[:ROWS].double(), of_y[:ROWS].double()),
        12 * y.numel(), swiglu, tunables,
    )  # fmt: skip


def rotary_apart_cases(sizes: Sizes, tokens: int) -> Iterator[Case]:
    heads = torch.randn(tokens, 1, sizes.group, sizes.head_dim, device=DEVICE, dtype=torch.bfloat16)
    cosine, sine = torch.randn(2, tokens, sizes.head_dim, device=DEVICE, dtype=torch.bfloat16)
    exact = [each[:ROWS].double() for each in (cosine, sine)]
    split = [sizes.group - 2 * sizes.keys, sizes.keys, sizes.keys]
    parts = [part.contiguous() for part in heads[:, 0].split(split, dim=1)]
    out, half = torch.empty_like(heads), sizes.head_dim // 2

    def theirs(parts: list[Tensor], cosine: Tensor, sine: Tensor) -> tuple[Tensor]:
        def turned(part: Tensor) -> Tensor:
            first, second = part[..., :half], part[..., half:]
            c, s = cosine[:, None, :half], sine[:, None, :half]
            return torch.cat([first * c + second * s, second * c - first * s], dim=-1)

        return (torch.cat([turned(parts[0]), turned(parts[1]), parts[2]], dim=1)[:, None],)

    tunables: dict[str, list[Any]] = {"_TOKENS_A_PROGRAM": [4, 8, 16], "_WARPS": [2, 4, 8]}
    moved = 4 * heads.numel() + 2 * cosine.numel()
    yield Case(
        f"rotate apart, join {list(heads.shape)}",
        lambda: (rotary.rotate_join(*parts, cosine, sine, out),), lambda: theirs(parts, cosine, sine),
        lambda: theirs([each[:ROWS].double() for each in parts], *exact),
        moved, rotary, tunables,
    )  # fmt: skip


def state_space_cases(sizes: StateSpaceSizes, tokens: int) -> Iterator[Case]:
    """Falcon-H1's convolution, scan and gate; theirs are the plain forms, judged by those in float32."""
    heads, width, shared = sizes.heads, sizes.heads * sizes.head_size, 2 * sizes.state
    columns = width + shared

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    space = ssd.StateSpace(
        groups=1,
        state=sizes.state,
        multipliers=torch.full((width + columns + heads,), 0.5, device=DEVICE),
        weight=make(columns, 4),
        bias=make(columns),
        step_bias=make(heads) - 2,
        limits=(0.0, math.inf),
        rate=-torch.rand(heads, device=DEVICE) - 0.1,
        skip=make(heads),
        norm=make(width),
        epsilon=EPS,
        norm_before_gate=False,
    )
    every = make(2, tokens, width + columns + heads), make(3, tokens, width), make(2, tokens, columns)

    def operations(rows: int, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        lengths = [min(DOCUMENT, rows - start) for start in range(0, rows, DOCUMENT)]
        sequences = Sequences.from_lengths(lengths, DEVICE)
        documents = sequences.position_ids[0], sequences.cu_seqlens
        projected, (grad, y, out), (convolved, of_convolved) = (each[:, :rows].to(dtype) for each in every)
        z, channels, steps = space.split(projected[0])
        of_z, of_channels, of_steps = space.split(projected[1])
        before = of_convolved, channels, space, documents[0]
        scanned, gated = (convolved, steps, space, *documents), (y, z, space)
        return {
            "convolve": lambda: (ssd_ops.convolve(*before[1:]),),
            "convolve, backward": lambda: (ssd_ops.convolve_backward(*before, of_channels),),
            "scan": lambda: (ssd_ops.scan(*scanned),),
            "scan, backward": lambda: (ssd_ops.scan_backward(grad, *scanned, of_steps), of_steps),
            "gate": lambda: (ssd_ops.gate(*gated, out),),
            "gate, backward": lambda: (ssd_ops.gate_backward(grad, *gated, of_z, out), of_z, out),
        }

    def by(form: ops.Implementation, run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], Any]:
        def launch() -> tuple[Tensor, ...]:
            with ops.using(form):
                return run()

        return launch

    ours = operations(tokens, torch.bfloat16)
    exact = operations(min(ROWS, tokens), torch.float32)
    states = 2 * width * sizes.state / FAST_SSD_TOKENS
    tiles = {
        "convolve": (convolution_triton, {"_TILE": [
            {"TOKENS": rows, "CHANNELS": 256 * warps, "num_warps": warps}
            for rows in (16, 32, 64) for warps in (1, 2)
        ]}),
        "scan": (ssd_triton, {
            "_WALK": [ssd_triton._WALK | {"num_stages": n, "num_warps": w} for n in (2, 3) for w in (4, 8)],
            "_OUTPUTS": [ssd_triton._OUTPUTS | {"LANES": n} for n in (32, 64, 128)],
        }),
        "scan, backward": (ssd_triton, {
            "_HEADS_A_PROGRAM": [3, 6, 12],
            "_OF_SCORES": [ssd_triton._OF_SCORES | {"num_warps": n} for n in (4, 8)],
            "_OF_SHARED": [ssd_triton._OF_SHARED | {"LANES": n} for n in (16, 32, 64)],
        }),
    }  # fmt: skip
    # A token's, as `ssd_ops` and `ssd_triton` count them.
    moved = {
        "convolve": 4 * columns,
        "convolve, backward": 6 * columns,
        "scan": 2 * states + 6 * width + 4 * shared + 60 * heads,
        "scan, backward": 5 * states + 16 * width + 8 * shared + 500 * heads,
        "gate": 6 * width,
        "gate, backward": 12 * width,
    }
    for name, run in ours.items():
        module, tunables = tiles.get(name, (gate_triton, {}))
        shown = f"{name} [{tokens}, {columns if name.startswith('convolve') else width}]"
        yield Case(
            shown, by("triton", run), by("torch", run), by("torch", exact[name]), moved[name] * tokens,
            module, tunables,
        )  # fmt: skip


def cases(sizes: Sizes | StateSpaceSizes, tokens: int) -> Iterator[Case]:
    if isinstance(sizes, StateSpaceSizes):
        yield from state_space_cases(sizes, tokens)
        return
    yield from nf4_cases(sizes)
    if sizes.keys > 1:
        yield from sequential_cases(sizes, tokens)
        yield from rotary_apart_cases(sizes, tokens)
        return
    yield from norm_cases(sizes, tokens)
    yield from rotary_cases(sizes, tokens)
    yield from gelu_cases(sizes, tokens)


def error(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest distance of the first rows, relative to the largest value."""
    return max(
        ((result[:ROWS].double() - target).abs().max() / target.abs().max()).item()
        for result, target in zip(results, expected, strict=True)
    )


def errors(case: Case) -> tuple[str, str]:
    """Ours and theirs, as the table shows them."""
    if case.reference is None:
        same = all(torch.equal(a, b) for a, b in zip(case.ours(), case.theirs(), strict=True))
        return ("same bits" if same else "OTHER BITS"), ""
    expected = case.reference()
    if not expected:
        return "", ""
    return f"{error(case.ours(), expected):.1e}", f"{error(case.theirs(), expected):.1e}"


def milliseconds(work: Callable[[], Any]) -> float:
    if DEVICE.type != "cuda":
        return float("nan")
    return triton.testing.do_bench(work, warmup=10, rep=60, return_mode="median")


def tune(case: Case) -> None:
    """Print the case's time under every choice, the fastest first."""
    names = list(case.tunables)
    before = {name: getattr(case.module, name) for name in names}
    times = []
    for values in itertools.product(*case.tunables.values()):
        for name, value in zip(names, values, strict=True):
            setattr(case.module, name, value)
        times.append((milliseconds(case.ours), values))
    for name, value in before.items():
        setattr(case.module, name, value)
    print(f"\n{case.name}: {', '.join(names)} (now {tuple(before.values())})")
    for time, values in sorted(times, key=lambda entry: entry[0]):
        share = case.bytes / time / 1e-3 / COPY_BYTES_A_SECOND
        print(f"  {1000 * time:8.1f} us  {share:5.0%}  {values}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try this script")
    parser.add_argument(
        "--tune", action="store_true", help="time other choices of the launchers, for the 7Bs"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    models = TINY if arguments.tiny else MODELS
    if arguments.tune:
        tuned = [each for each in models if each.name != "40B"]
        for case in itertools.chain(*(cases(each, arguments.tokens) for each in tuned)):
            tune(case)
        return
    print(torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU: errors alone", end="\n\n")
    header = "model", "kernel", "error", "their error", "µs", "MB", "of copies' speed", "their µs", "ratio"
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for sizes in models:
        for case in cases(sizes, arguments.tokens):
            ours, theirs = errors(case)
            time, their_time = milliseconds(case.ours), milliseconds(case.theirs)
            share = case.bytes / time / 1e-3 / COPY_BYTES_A_SECOND
            row = sizes.name, case.name, ours, theirs, f"{1000 * time:.1f}", f"{case.bytes / 1e6:.0f}"
            row += f"{share:.0%}", f"{1000 * their_time:.1f}", f"{their_time / time:.2f}"
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
