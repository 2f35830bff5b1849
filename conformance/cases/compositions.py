"""Batch compositions: which requests a step consists of, by a name or spelled out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from porthal.conformance.cases.values import Draw

COMPOSITIONS = ("decode", "prefill", "chunked", "mixed", "padded", "idle", "deep", "long", "drafts")
DRAFTS = "drafts"  # as mixed, with pages that rejected drafts have left behind the end of every request
CROWD = "crowd"  # requests of 64 rows that share pages: 65536 rows in a small cache
LONG = 131072  # the keys that a long batch's first row sees
LONGEST = 2**20  # and any request at most: GLM-5.2's max_position_embeddings
EACH = 64  # rows of each of many requests
MANY = 2**12  # requests that a composition may spell out
DECODING = 8  # most query rows of a request that counts as decoding
_ONE = r"(\d{1,4}\*)?\d{1,7}/\d{1,7}(/\d{1,7})?"
_REQUESTS = re.compile(rf"{_ONE}(\+{_ONE})*", re.ASCII)


class Request(NamedTuple):
    """Query rows, keys that the last of them sees, and how many leading pages are those of the request before."""

    q: int
    kv: int
    shared: int = 0


@lru_cache(maxsize=1024)
def requests(batch: str) -> tuple[Request, ...] | None:
    """The requests that a composition spells out, "64*1/5" being 64 alike; None where it is a name, or they are too many."""
    if not _REQUESTS.fullmatch(batch):
        return None
    found: list[Request] = []
    for part in batch.split("+"):
        times, _, one = part.rpartition("*")
        found += [Request(*map(int, one.split("/")))] * min(int(times or 1), MANY + 1)
    return tuple(found) if len(found) <= MANY else None


def spelled(found: Sequence[Request]) -> str:
    """The composition that spells these requests out, and that `requests` reads."""
    alike = ((one, len(list(group))) for one, group in groupby(found))
    return "+".join(f"{n}*" * (n > 1) + "/".join(map(str, one if one.shared else one[:2])) for one, n in alike)


def parted(rows: int) -> list[int]:
    """So many rows in requests of EACH, behind one of what is left."""
    left = rows % EACH
    return [left] * (left > 0) + [EACH] * (rows // EACH)


def shareable(before: Request, request: Request, block_size: int, written: bool) -> int:
    """The most pages that a request may share with the one before: where a step writes, pages filled before it."""
    new = [r.q * (written and r.kv > 0) for r in (before, request)]
    full = [(r.kv - q) // block_size if written else -(-r.kv // block_size) for r, q in zip((before, request), new)]
    return min(full)


def spare(batch: str, requests: int) -> list[int]:
    """How many pages behind its end each request of a composition holds."""
    return [(1 + r % 3) * (batch == DRAFTS) for r in range(requests)]


def lengths(batch: str, T: int, k: int, block_size: int, stream: str) -> tuple[list[int], list[int]]:
    """Query and key lengths per request of a composition with T query rows; `stream` names what is drawn."""
    if (free := requests(batch)) is not None:
        return [r.q for r in free], [r.kv for r in free]
    size, reach = block_size, min(k, 512)  # rows on both sides of a top-k's k
    drawn = Draw(f"{stream}/kv", (max(T, 1),)).integers(1, 2 * size + 8 + reach).tolist()
    if batch == "decode":
        return [1] * T, drawn[:T]
    if batch == "prefill":
        return [T], [T]
    if batch == "chunked":
        return [T], [T + size + 5]
    if batch == DRAFTS:  # an end within a page, at the end of one, and a request that only fills its place
        decoding = min(T // 2, 8)
        ends = [(n, -(-n // size) * size, 0)[r % 3] for r, n in enumerate(drawn[:decoding])]
        return [1] * decoding + [T - decoding], [*ends, -(-(T - decoding + reach) // size) * size]
    if batch == "mixed":
        decoding = min(T // 2, 8)
        return [1] * decoding + [T - decoding], [*drawn[:decoding], T - decoding + 19 + reach]
    if batch == "padded":
        return [1] * T, [0 if r % 3 == 1 else n for r, n in enumerate(drawn[:T])]
    if batch == "idle":
        return [r % 2 for r in range(2 * T)], [0 if r % 4 == 0 else drawn[r // 2] for r in range(2 * T)]
    if batch == "deep":
        return [min(T, 1), max(T - 1, 0)], [k + 1, k + T + 3]
    if batch == "long":
        return [1] * T, [LONG - 977 * (r % 100) for r in range(T)]
    rows = [64] * (T // 64) + [T % 64] * (T % 64 > 0)  # crowd
    return rows, [n + r % 4 for r, n in enumerate(rows)]
