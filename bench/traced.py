"""Workloads from files: the calls that `porthal trace --json` lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porthal.bench.scale import BLOCK_SIZE
from porthal.conformance.cases.compositions import Request
from porthal.hal import CallSpec, UsageError, contracts
from porthal.hal.contract import Contract
from porthal.hal.signature import unify


@dataclass(frozen=True)
class Traced:
    """The calls of a file, each as often as it counts, and the requests of their step."""

    name: str
    calls: list[tuple[str, CallSpec]]
    requests: tuple[Request, ...]
    dtype: str


def read(file: str) -> Traced:
    """The calls in a file; UsageError for a file that cannot be read, or holds something else."""
    path = Path(file)
    if not path.is_file():
        others = "a file of porthal trace --json, or a data set of FlashInfer-Bench"
        raise UsageError(f"unknown workload {file!r}: expected glm5, half, demo, {others}")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read as JSON ({error}): expected a file of porthal trace --json") from None
    try:
        calls = [(str(c["op"]), _spec(c), int(c["count"])) for c in listed]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{file} is of another schema ({type(error).__name__}: {error}): expected the list that porthal trace --json prints"
        ) from None
    if not calls:
        raise UsageError(f"{file} lists no call: expected those of a step, as porthal trace --json prints them")
    batches = [_batch(contracts()[op], spec) for op, spec, _ in calls]
    rows, n, keys = (max((b[at] for b in batches if len(b) > at), default=1) for at in range(3))
    keys = max(keys, rows // n)
    if rows % n:
        raise UsageError(f"{file} has {rows} rows in {n} requests: expected as many rows in each")
    dtypes = {d for _, spec, _ in calls for d in spec.dtypes.values()}
    dtype = next((d for d in ("bfloat16", "float16") if d in dtypes), "float32")
    every = [(op, spec) for op, spec, count in calls for _ in range(count)]
    return Traced(path.stem, every, (Request(rows // n, keys),) * n, dtype)


def _spec(call: Mapping[str, Any]) -> CallSpec:
    """The static facts of a listed call, from the shapes of its operands."""
    known = contracts()
    if call["op"] not in known:
        raise KeyError(f"op is {call['op']}")
    contract, attrs = known[call["op"]], dict(call["attributes"])
    env: dict[str, int] = {k: v for k, v in attrs.items() if isinstance(v, int) and not isinstance(v, bool)}
    waiting = [pair for name, facts in call["operands"].items() for pair in _sizes(contract, name, facts)]
    for _ in range(2):  # a dim of two symbols may wait for another operand
        waiting = [pair for pair in waiting if not _unified(*pair, env)]
    if waiting:
        raise ValueError(f"{contract.name} has {waiting[0][0]} = {waiting[0][1]}")
    if broken := [o.name for o in contract.signature.operands if not o.optional and o.name not in call["operands"]]:
        raise KeyError(broken[0])
    kinds = {o.kind for o in contract.signature.operands}
    paged = {"block_size": BLOCK_SIZE} if kinds & {"Batch", "Pages"} else {}
    dtypes = {name: facts["dtype"] for name, facts in call["operands"].items() if facts["dtype"]}
    schemes = {name: facts["scheme"] for name, facts in call["operands"].items() if "scheme" in facts}
    return CallSpec({k: v for k, v in env.items() if k not in attrs} | paged, dtypes, attrs, schemes)


def _sizes(contract: Contract, name: str, facts: Mapping[str, Any]) -> list[tuple[str, int]]:
    declared = contract.signature[name]
    if "fields" in facts:
        return [(width, int(facts["fields"][field])) for field, width, _ in declared.fields if field in facts["fields"]]
    shape = facts["shape"]
    if len(shape) != len(declared.dims):
        raise ValueError(f"{contract.name}.{name} has shape {shape}")
    return [(dim, int(size)) for dim, size in zip(declared.dims, shape)]


def _unified(dim: str, size: int, env: dict[str, int]) -> bool:
    try:
        return unify(dim, size, env)
    except KeyError:
        return False


def _batch(contract: Contract, spec: CallSpec) -> list[int]:
    """Rows, requests and keys of a call, as far as its batch shows them."""
    return [size for o in contract.signature.of_kind("Batch") for d in o.dims if isinstance(size := spec.dims[d], int)]
