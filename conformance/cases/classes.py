"""Into which classes the sizes and forms of a call are divided: calls of the same classes take the same ways in a kernel.

A size is 1, a few, or between two numbers at which tiles, counters and grids end; above a few it is a multiple of what is
loaded at once, or leaves a remainder. Of each class there are points in turn: at such numbers, and beside them.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from itertools import cycle

from porthal.conformance.cases.boundaries import GRIDS, TILES, UNEVEN
from porthal.conformance.cases.compositions import (
    COMPOSITIONS,
    DECODING,
    DRAFTS,
    EACH,
    Request,
    requests,
    shareable,
    spelled,
)

LOADED = 8  # numbers that a kernel loads at once: 16 bytes of 16 bits
ENDS = (0, 1, LOADED - 1, 64, 256, 1024, 4096, 2**15, 2**16, 2**20)  # of the magnitudes of a size
FEW = 3  # magnitudes, up to which rows are few
CROWDED = 2**10  # rows, of which not each can be a request
SHORT = 16  # rows of a composition that is a name
LEAST = 2  # rows of a request whose drafts are verified
VERIFIED = (5, 2, 8, 3, 7, 4, 6)  # rows of requests whose drafts are verified, in turn
KEYS = "S"
FORMS = ("decode", "prefill", "mixed", "padded", "idle", "shared", DRAFTS)  # of a batch
NAMES = dict(zip(COMPOSITIONS, ("decode", "prefill", "prefill", "mixed", "padded", "idle", "mixed", "decode", DRAFTS)))


@lru_cache(maxsize=4096)
def size_class(v: int) -> int:
    """A size's class: twice its magnitude, and one more where it leaves a remainder."""
    at = bisect_left(ENDS, v)
    return 2 * at + (at >= FEW and v % LOADED > 0)


@lru_cache(maxsize=64)
def points(label: int) -> tuple[int, ...]:
    """The sizes of a class that a plan takes in turn: the numbers at which kernels break and the next ones, then others."""
    at, ragged = divmod(label, 2)
    if at < FEW:
        return ((0,), (1,), (3, 2, 7, 5, 4))[at]
    low, high = ENDS[at - 1] + (at == FEW), ENDS[at]
    numbers = [n for n in (*TILES, *GRIDS) if low <= n <= high]
    if ragged:
        found = [*(n + more for n in numbers for more in (3, 1)), *(n - 1 for n in numbers)]
        found += [n + n // 2 + more for n in numbers for more in (4, 2)]
    else:
        found = [*numbers[::-1], *(n // 4 * 3 for n in numbers), *(n + LOADED for n in numbers), UNEVEN, 2 * UNEVEN]
    return tuple(dict.fromkeys(n for n in found if size_class(n) == label))


def form_of(batch: str, distinct: int = 0) -> str:
    """Of FORMS that of a batch; copies share pages whatever it says."""
    found = requests(batch)
    if found is None:
        return NAMES.get(batch, "mixed")
    if any(r.shared for r in found) and not distinct:
        return "shared"
    if any(not r.q for r in found):
        return "idle"
    if any(not r.kv for r in found):
        return "padded"
    if sum(r.q > 1 for r in found) > 1 and max(r.q for r in found) <= DECODING:
        return DRAFTS
    return "decode" if all(r.q == 1 for r in found) else "prefill" if len(found) == 1 else "mixed"


@lru_cache(maxsize=256)
def has_form(label: int, form: str) -> bool:
    """Whether batches of so many rows have this form."""
    return any(form_of(batch_of(form, rows, 2**12, 64, written=False)) == form for rows in points(label) if rows)


def batch_of(form: str, rows: int, keys: int, size: int, written: bool) -> str:
    """A composition of this form: so many rows, the last of which see these keys, behind others that see few. Of few rows
    drafts are a name, since their tables are longer than requests are."""
    if form == DRAFTS and rows <= SHORT:
        return DRAFTS
    if form == "prefill" or (rows == 1 and form in ("mixed", DRAFTS)):
        return spelled([Request(rows, max(keys, rows))])
    if form == DRAFTS and 2 * LEAST <= rows <= CROWDED:
        return spelled(_verified(rows, keys, size))
    if form in ("mixed", DRAFTS) or rows > CROWDED:
        first = min((rows - 1) // 2 or 1, DECODING)  # of an even number rows are as many to a request as if all were alike
        few = [Request(1, min(keys, 9)), *[Request(1, min(keys, size))] * (first - 1)][:first]
        left = rows - first
        more = [Request(left // 3, left // 3 + min(keys, size))] * (2 * (left > 3 * EACH))
        left -= sum(r.q for r in more)
        return spelled([*few, *more, Request(left, max(keys, left))])
    half = (rows - 1) // 2
    last = Request(1, keys)
    found = [*[Request(1, min(keys, 9))] * half, *[Request(1, min(keys, size))] * (rows - 1 - half), last]
    if form == "padded" and rows > 1:
        found = [*found[:half], Request(1, 0), *found[half + 1 :]]
    if form == "idle":
        found = [Request(0, 5), *found, Request(0, 0)]
    if form == "shared" and rows > 1:
        found = [*found[:-2], last, last._replace(shared=shareable(last, last, size, written))][-rows:]
    return spelled(found)


def _verified(rows: int, keys: int, size: int) -> list[Request]:
    """Requests that decode with drafts, of as many rows as that may be, of an even number in all as many as if they were
    alike; the last sees the keys, the others few or a page."""
    found: list[int] = []
    each = 4 if rows % 4 == 0 else 2
    for q in cycle(VERIFIED) if rows % 2 else [each - 1, each + 1] * (rows // each // 2):
        if sum(found) + q >= rows:
            break
        found.append(q)
    found = found or [rows // 2]
    found[-1] -= sum(found) == rows - 1  # the last has drafts, too
    seen = (max(q, min(keys, 9 if n % 2 else size)) for n, q in enumerate(found))
    last = rows - sum(found)
    return [*map(Request, found, seen), Request(last, max(keys, last))]
