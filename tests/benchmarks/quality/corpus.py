"""Real text to train a base on: what is installed on this machine, tokenized.

    python -m tests.benchmarks.quality.corpus --tokenizer FOLDER --out FILE.npy

Sources, documentation and headers of the standard library, the installed packages and the system. Nothing of
it leaves the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu", ".pod"}
DOCUMENT_BYTES = (400, 400_000)
PACKAGE_SHARE = 0.12  # of the text at most from one package: many hands, not one project's habits
ASCII_SHARE = 0.97


def gather(
    out: Path,
    tokenizer: Path,
    *,
    megabytes: float,
    processes: int,
    roots: list[Path] | None = None,
    seed: int = 0,
) -> int:
    """Write the tokens of this machine's text to `out`, each document followed by the end token.

    Args:
        out: a ``.npy`` file, uint16 ``[tokens]``.
        tokenizer: folder of a ``tokenizer.json`` with fewer than 65,536 ids.
        megabytes: stop at so much text.
        processes: how many tokenize.
        roots: folders to read; where Python looks for packages, and the system's, where None.
        seed: of the documents' order.

    Returns:
        How many tokens.
    """
    texts = list(_texts(_files(roots or _default_roots(), seed), int(megabytes * 1e6)))
    size = max(1, min(500, -(-len(texts) // processes)))
    chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
    if processes == 1:
        _open_tokenizer(tokenizer)
        parts = [_encode(chunk) for chunk in chunks]
    else:
        # The tokenizer's own threads stay off: the processes are as many as the cores.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with ProcessPoolExecutor(
            processes, get_context("spawn"), initializer=_open_tokenizer, initargs=(tokenizer,)
        ) as pool:
            parts = list(pool.map(_encode, chunks))
    tokens = np.concatenate(parts)
    np.save(out, tokens)
    return len(tokens)


def _default_roots() -> list[Path]:
    paths = sysconfig.get_paths()
    found = [Path(paths[name]) for name in ("stdlib", "purelib", "platlib")]
    found += [Path(entry) for entry in sys.path if Path(entry).resolve() != Path.cwd()]
    found += [Path("/usr/include"), Path("/usr/local/cuda/include"), Path("/usr/share/doc")]
    return list(dict.fromkeys(path.resolve() for path in found if path.is_dir()))


def _files(roots: list[Path], seed: int) -> list[tuple[str, Path]]:
    """``(package, file)`` in random order, each file once."""
    files: dict[Path, str] = {}
    for root in roots:
        for folder, folders, names in os.walk(root):
            # Packages under the standard library are a root of their own.
            folders[:] = sorted(name for name in folders if not name.endswith("-packages"))
            place = Path(folder)
            package = f"{root}/{place.relative_to(root).parts[0]}" if place != root else str(root)
            for name in sorted(names):
                if Path(name).suffix in SUFFIXES:
                    files.setdefault(place / name, package)
    listed = [(package, path) for path, package in files.items()]
    Random(seed).shuffle(listed)
    return listed


def _texts(files: list[tuple[str, Path]], limit: int) -> Iterator[str]:
    """Up to `limit` characters of distinct texts that are mostly ASCII."""
    seen: set[bytes] = set()
    of_package: dict[str, int] = defaultdict(int)
    total = 0
    for package, path in files:
        if total >= limit:
            return
        if of_package[package] >= PACKAGE_SHARE * limit:
            continue
        try:
            if not DOCUMENT_BYTES[0] <= path.stat().st_size <= DOCUMENT_BYTES[1]:
                continue
            raw = path.read_bytes()
        except OSError:
            continue
        digest = hashlib.sha1(raw).digest()
        # Letters are most of any text; tables of numbers and encoded data are left out.
        letters = sum(map(raw.count, b"etaoinsrhld "))
        if digest in seen or letters < 0.4 * len(raw):
            continue
        if len(raw.translate(None, _NOT_ASCII)) < ASCII_SHARE * len(raw):
            continue
        seen.add(digest)
        of_package[package] += len(raw)
        total += len(raw)
        yield raw.decode("utf-8", errors="ignore")


_NOT_ASCII = bytes([*range(9), *range(127, 256)])
_tokenizer: Tokenizer | None = None


def _open_tokenizer(folder: Path) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))


def _encode(texts: list[str]) -> np.ndarray:
    assert _tokenizer is not None
    end = _tokenizer.token_to_id("<|endoftext|>")
    assert end is not None
    assert _tokenizer.get_vocab_size() < 2**16
    encodings = _tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, end], dtype=np.uint16) for encoding in encodings])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=280)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    started = time.perf_counter()
    tokens = gather(
        arguments.out,
        arguments.tokenizer,
        megabytes=arguments.megabytes,
        processes=arguments.processes,
    )
    print(f"- {tokens:,} tokens of text in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
