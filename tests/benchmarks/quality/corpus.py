"""Real text to train a base on: what is installed on this machine or what is given, tokenized.

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
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from falcon_qlora.common.errors import EXIT_USER_ERROR, UserError

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu", ".pod"}
DOCUMENT_BYTES = (400, 400_000)
PACKAGE_SHARE = 0.12  # of the text at most from one package: many hands, not one project's habits
ASCII_SHARE = 0.97
CHUNK_CHARACTERS = 500_000  # tokenized at a time
_READERS = 16  # a disk that answers slowly is asked for many files at once


def gather(
    out: Path,
    tokenizer: Path,
    *,
    megabytes: float,
    processes: int,
    roots: list[Path] | None = None,
    text: Path | None = None,
    seconds: float = 40,
    seed: int = 0,
) -> int:
    """Write the tokens of this machine's text to `out`, each document followed by the end token.

    Args:
        out: a ``.npy`` file, uint16 ``[tokens]``.
        tokenizer: folder of a ``tokenizer.json`` with fewer than 65,536 ids.
        megabytes: stop at so much text.
        processes: how many tokenize.
        roots: folders to read; where Python looks for packages, and the system's, where None.
        text: a file or a folder of text, read in its place and as it is.
        seconds: stop reading after so long; what was read is still tokenized.
        seed: of the documents' order.

    Returns:
        How many tokens.

    Raises:
        UserError: if there is no text.
    """
    until = time.monotonic() + seconds
    limit = int(megabytes * 1e6)
    if text is not None:
        texts = _given(text, limit)
    else:
        texts = _texts(_files(roots or _default_roots(), seed), limit)
    chunks = takewhile(lambda _: time.monotonic() < until, _chunks(texts))
    if processes == 1:
        _open_tokenizer(tokenizer)
        parts = [_encode(chunk) for chunk in chunks]
    else:
        parts = _encode_in_processes(chunks, tokenizer, processes)
    if not parts:
        raise UserError(f"{text or 'this machine'} has no text to train on. Name some with --text.")
    tokens = np.concatenate(parts)
    np.save(out, tokens)
    return len(tokens)


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if sum(map(len, chunk)) >= CHUNK_CHARACTERS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _encode_in_processes(chunks: Iterator[list[str]], tokenizer: Path, processes: int) -> list[np.ndarray]:
    # The tokenizer's own threads stay off: the processes are as many as the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parts: list[np.ndarray] = []
    pending: deque[Future[np.ndarray]] = deque()
    with ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=_open_tokenizer, initargs=(tokenizer,)
    ) as pool:
        for chunk in chunks:
            pending.append(pool.submit(_encode, chunk))
            # A few each, so that little is left to do when the time is over.
            if len(pending) > 3 * processes:
                parts.append(pending.popleft().result())
        return parts + [future.result() for future in pending]


def _given(text: Path, limit: int) -> Iterator[str]:
    """Documents of a file or folder; a file that is longer than a document may be is cut at ends of lines."""
    files = [text] if text.is_file() else sorted(p for p in text.rglob("*") if p.suffix in SUFFIXES)
    total = 0
    for path in files:
        document = ""
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines(keepends=True):
            if total >= limit:
                break
            if document and len(document) + len(line) > DOCUMENT_BYTES[1]:
                yield document
                document = ""
            document += line
            total += len(line)
        if document:
            yield document


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
    for package, raw in _read(files):
        if total >= limit:
            return
        if not raw or of_package[package] >= PACKAGE_SHARE * limit:
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


def _read(files: list[tuple[str, Path]]) -> Iterator[tuple[str, bytes]]:
    """``(package, content)``, of no bytes where a file cannot be read or is of no fitting size."""

    def read(path: Path) -> bytes:
        try:
            if DOCUMENT_BYTES[0] <= path.stat().st_size <= DOCUMENT_BYTES[1]:
                return path.read_bytes()
        except OSError:
            pass
        return b""

    with ThreadPoolExecutor(_READERS) as readers:
        for start in range(0, len(files), 32 * _READERS):
            some = files[start : start + 32 * _READERS]
            contents = readers.map(read, [path for _, path in some])
            yield from zip([package for package, _ in some], contents, strict=True)


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
    parser.add_argument("--text", type=Path, help="file or folder to read in place of what is installed")
    parser.add_argument("--seconds", type=float, default=40, help="stop reading after so long")
    parser.add_argument("--processes", type=int, default=min(16, len(os.sched_getaffinity(0))))
    arguments = parser.parse_args()
    started = time.perf_counter()
    try:
        tokens = gather(
            arguments.out,
            arguments.tokenizer,
            megabytes=arguments.megabytes,
            processes=arguments.processes,
            text=arguments.text,
            seconds=arguments.seconds,
        )
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR) from None
    print(f"- {tokens:,} tokens of text in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
