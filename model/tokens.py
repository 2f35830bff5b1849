"""Token ids on the host: texts to ids and back, checks, and the random numbers of sampling."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from porthal.hal import UsageError
from porthal.hal.errors import foreign

Array = np.ndarray[Any, Any]


class Bytes:
    """A byte-level vocabulary: token i is byte i."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class Vocabulary:
    """A tokenizer.json, read by the `tokenizers` package."""

    def __init__(self, file: Path) -> None:
        try:
            with foreign("the Python package tokenizers does not import", UsageError):
                import tokenizers
        except UsageError as error:
            raise UsageError(f"{file} needs {error}; pip install tokenizers") from None
        self._damaged = f"{file} is damaged, or not for tokenizers {tokenizers.__version__}"
        with foreign(self._damaged, UsageError):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))

    def encode(self, text: str) -> list[int]:
        with foreign(self._damaged, UsageError):
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        with foreign(self._damaged, UsageError):
            return str(self._tokenizer.decode(list(ids)))


def tokenizer(directory: str | Path, vocab_size: int) -> Bytes | Vocabulary:
    """The directory's tokenizer.json, or bytes where the vocabulary is 256."""
    file = Path(directory) / "tokenizer.json"
    if os.path.lexists(file):  # a folder, or a link to nothing, is a mistake and not a model of bytes
        return Vocabulary(file)
    if vocab_size == 256:
        return Bytes()
    raise UsageError(f"{directory} has no tokenizer.json: add one, since vocab_size is {vocab_size}, not 256 for bytes")


def check_ids(tokens: Sequence[int], vocab_size: int, longest: int) -> list[int]:
    """The tokens as ints; UsageError when there are none, too many, or one is out of range."""
    if not isinstance(tokens, Iterable):
        raise UsageError(f"the prompt is {tokens!r}: expected a sequence of token ids")
    ids = [check_count(f"token {i}", token, 0, vocab_size - 1) for i, token in enumerate(tokens)]
    if not ids:
        raise UsageError("the prompt is empty: give at least one token")
    if len(ids) > longest:
        raise UsageError(f"the prompt has {len(ids)} tokens: expected at most {longest}, the context")
    return ids


def check_count(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int; UsageError unless it is a whole number from `low` to `high`."""
    try:
        count = low - 1 if isinstance(value, bool) else index(value)
    except TypeError:
        count = low - 1
    if count < low or (high is not None and count > high):
        bound = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name} is {value!r}: expected a whole number {bound}")
    return count


def check_number(name: str, value: Any, high: float | None = None) -> float:
    """The value as a float; UsageError unless it is a finite number from 0 to `high`."""
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf or (high is not None and number > high):
        raise UsageError(f"{name} is {value!r}: expected a number {'of at least 0' if high is None else f'from 0 to {high:g}'}")
    return number


def ids_array(ids: Sequence[int]) -> Array:
    return np.asarray(ids, np.int32)


def float_array(values: Sequence[Any]) -> Array:
    return np.asarray(values, np.float32)


def stack_rows(parts: Sequence[Array]) -> Array:
    return np.concatenate(parts)


def uniforms(seed: int, requests: Sequence[int], positions: Sequence[int], count: int) -> Array:
    """float32 [R, count] in [0, 1): a function of (seed, request, position) alone, for any batch and chip."""
    rows = [
        np.random.Generator(np.random.Philox(key=[seed % 2**64, (r << 32) + p])).random(count, np.float32)
        for r, p in zip(requests, positions)
    ]
    return np.stack(rows)


def log2_sum(logprobs: Sequence[float]) -> float:
    """The sum of natural log probabilities, in bits."""
    return math.fsum(logprobs) / math.log(2)
