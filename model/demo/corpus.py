"""Text of the demo checkpoint, and the byte model that it has to beat.

The text is the standard library of the running interpreter: always at hand, plain, and long enough to teach a small
model. Files are taken in path order and told apart by SHA-256, so the same interpreter always gives the same bytes.
`HELD_OUT` names the files that are never trained on: a copy under another path is left out as well.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

EOS = 0  # a byte that no source file contains: it separates documents, and it ends generation

# Not prose of programmers: tests, generated tables, installed packages, and files that describe this machine.
SKIPPED_FOLDERS = {"__pycache__", "encodings", "ensurepip", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

# Small modules of different kinds, stable between releases; textwrap.py is the one that the goals are stated for.
HELD_OUT = {
    "csv.py": "6c68a5186e3b85e6e267a7ef96479327a45ae2b40bf5e9f2017e4b2282b3f5b1",
    "fractions.py": "b11e850e354808b882d13a70a911c29accd1dbdd41757566704e3b7206c74edb",
    "graphlib.py": "7bd338c5a475d1101064603d3baa5507446d3c5e73f741f6d6e77c6204c1eb65",
    "shlex.py": "42ab6060f316e121e374e6621d8c1c98b8db323903c3df289a810c45a8ae46a7",
    "textwrap.py": "62867e40cdea6669b361f72af4d7daf0359f207c92cbeddfc7c7506397c1f31c",
    "zipapp.py": "776078e89fd7dadbce41678f8bacd3b493135e6d610911c867489415420de383",
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sources(root: Path | None = None) -> list[tuple[str, bytes]]:
    """Every distinct source file of the standard library as (path relative to it, content), in path order."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, tuple[str, bytes]] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts) or any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            continue
        data = path.read_bytes()
        if data and EOS not in data:
            found.setdefault(sha256(data), ("/".join(parts), data))
    return list(found.values())


def training(root: Path | None = None) -> list[tuple[str, bytes]]:
    """The files to train on: all sources whose content is not held out, nor stands at the place of a held-out file."""
    hashes = set(HELD_OUT.values())
    return [(name, data) for name, data in sources(root) if name not in HELD_OUT and sha256(data) not in hashes]


def held_out(root: Path | None = None) -> list[tuple[str, bytes]]:
    """The held-out files that this interpreter has with the very content that was held out.

    Raises LookupError if there is none: another release of Python may have changed them all.
    """
    files = [(name, data) for name, data in sources(root) if HELD_OUT.get(name) == sha256(data)]
    if not files:
        raise LookupError(
            f"none of the {len(HELD_OUT)} held-out files has its recorded SHA-256 in this standard library; "
            "run with the Python release named in the checkpoint's recipe"
        )
    return files


def stream(files: list[tuple[str, bytes]]) -> Array:
    """The files as one uint8 array, each document preceded by EOS."""
    joined: Array = np.frombuffer(b"".join(bytes([EOS]) + data for _, data in files), np.uint8)
    return joined


class ByteModel:
    """An interpolated byte model of a fixed order with Witten-Bell smoothing.

        p_k(b | c) = (n(c b) + d(c) p_{k-1}(b | c')) / (n(c) + d(c)),   p_{-1} = 1 / 256

    n counts occurrences in the training text, d(c) is the number of different bytes seen after the context c of k
    bytes, and c' is c without its first byte. At most order 7, so that context and byte fit one 64-bit code.
    """

    def __init__(self, text: Array, order: int = 3) -> None:
        if not 0 <= order <= 7:
            raise ValueError(f"order is {order}, expected 0 to 7")
        self.order = order
        self._tables = []
        for length in range(order + 1):
            grams, counts = np.unique(_codes(text, length + 1)[length:], return_counts=True)
            contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
            totals, distinct = np.add.reduceat(counts, first), np.diff(first, append=len(grams))
            self._tables.append((grams, counts, contexts, totals, distinct))

    def bits(self, text: Array) -> Array:
        """-log2 p of every byte of uint8 `text`, float64; the text is taken to follow a run of EOS."""
        p = np.full(len(text), 1 / 256)
        for length, (grams, counts, contexts, totals, distinct) in enumerate(self._tables):
            code = _codes(text, length + 1)
            seen = _look_up(grams, counts, code)
            context = code >> np.uint64(8)
            n, d = _look_up(contexts, totals, context), _look_up(contexts, distinct, context)
            p = np.where(n > 0, (seen + d * p) / np.maximum(n + d, 1), p)
        cost: Array = -np.log2(p)
        return cost

    def bits_per_byte(self, text: Array) -> float:
        return float(self.bits(text).mean())


def _codes(text: Array, length: int) -> Array:
    """The last `length` bytes up to and with each position as one big-endian integer; EOS stands before the text."""
    code: Array = np.zeros(len(text), np.uint64)
    for back in range(min(length, len(text))):
        code[back:] |= text[: len(text) - back].astype(np.uint64) << np.uint64(8 * back)
    return code


def _look_up(keys: Array, values: Array, wanted: Array) -> Array:
    """values[keys == wanted] for sorted unique keys, 0 where a key is missing."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found: Array = np.where(keys[at] == wanted, values[at], 0)
    return found
