"""Whether a contract allows a call, and how large it is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from porthal.conformance.cases.compositions import (
    COMPOSITIONS,
    CROWD,
    DECODING,
    LONGEST,
    Request,
    lengths,
    requests,
    shareable,
    spare,
)
from porthal.conformance.cases.domain import absences, fitting, joined, per_expert
from porthal.conformance.cases.programs import PROGRAMS, programs
from porthal.hal.contract import Contract
from porthal.hal.signature import ARRAY, evaluate, symbols

if TYPE_CHECKING:
    from porthal.conformance.cases.case import Case

VIEWS = ("columns", "rows", "transposed", "broadcast")
PITCHES = ("alone", "others")  # of arrays with as many rows the first has a pitch of its own, or all others have
LAYOUTS = ("heads", "slices", "joint", *PITCHES)  # of operands as other kernels hand them over, where an op has such
FAR = "far"  # rows so far apart that byte offsets need more than 31 bits; takes 2 GiB of addresses, hence in few plans
PAST_2G = "beyond"  # the cache, or the experts' weights, lie behind 2^31 elements
THREADS = "threads"  # operands placed and the kernel called in several threads at once
FAULTS = ("dtype", "shape", "kind", "attribute", "range")
# Of several ranks, one of which makes another call, a wrong one, or none; "overflow" is the fault of all.
RANK_FAULTS = ("dtype", "shape", "range", "overflow", "other", "killed", "stalled")
GROUPS = "groups"  # a program of ranks: two groups make the call at once
MOST_RANKS = 64
PAGES = 6  # of a cache that no batch describes
OF_CODES = ("halfway",)  # values that are drawn from the codes of a scheme
# What a token may ask for; `copied` are the elements of a call whose rows are copies of few.
LARGEST = {"size": 2**20, "distinct": 64, "seed": 2**32, "elements": 2**27, "copied": 2**29}
DISTINCT = f"at least 2 and at most {LARGEST['distinct']}"


def refusal(case: Case) -> str:
    """Why the contract allows no such call, or ""."""
    contract, sizes = case.contract, dict(case.dims)
    attrs = case.attributes
    given = [[name for name, _ in pairs] for pairs in (case.dims, case.attrs, case.dtypes, case.recipes, case.schemes)]
    for names in (*given, case.absent):
        if twice := [name for name in names if names.count(name) > 1]:
            return f"{twice[0]} is given twice"
    unset = [name for name, value in attrs.items() if value is inspect.Parameter.empty]
    if lacking := [*(s for s in _sizes(case) if s not in sizes), *unset, *_unpaged(case)]:
        return f"it lacks {', '.join(lacking)}"
    known = contract.signature.symbols() - _bound(case)
    for name, size in sizes.items():
        if name not in known:
            return f"{name} is not one of its sizes, expected {_one_of(_sizes(case))}"
        if size == 0 and name != contract.rows and 0 not in contract.cases.get(name, ()):
            return f"{name} is 0, expected at least 1"
    alone = (_refused_batch, _refused_fault, _refused_copies, _refused_program, _refused_capture)
    for check in (_refused_operands, *((_refused_ranked,) if contract.collective else alone)):
        if why := check(case):
            return why
    facts = SimpleNamespace(**attrs, **sizes, **({"block_size": case.block_size} if case.block_size else {}))
    broken = contract.broken(facts)
    return f"it requires {broken}" if broken else ""


def _refused_operands(case: Case) -> str:
    """What is wrong with dtypes, recipes, absences, the view, or the number of indices."""
    contract, sizes = case.contract, dict(case.dims)
    operands = {o.name: o for o in contract.signature.operands}
    for name, given in case.dtypes:
        if name not in (typed := [o for o in operands if o in contract.dtypes]):
            return f"{name} is not an operand{' with a dtype' * (name in operands)}, expected {_one_of(typed)}"
        if given not in (permitted := [case.dtype(o) if o in operands else o for o in contract.dtypes[name]]):
            return f"{name} is {given}, expected {_one_of(permitted)}"
    for name, given in case.recipes:
        if name not in (drawn := [o for o in operands if operands[o].kind not in ("Batch", "Communicator")]):
            return f"{name} is not an operand{' with values' * (name in operands)}, expected {_one_of(drawn)}"
        if given not in (known := fitting(contract, name)):
            return f"{given or 'empty'} is not a value generator for {name}, expected {_one_of(known)}"
        if given in OF_CODES and not (case.schemes or "scheme" in case.attributes or operands[name].kind == "Quantised"):
            return f"{given} is about codes: it needs a scheme"
    for name, given in case.schemes:
        if given not in (taken := contract.schemes.get(name, ())):
            return f"{name} is under scheme {given or 'empty'}, expected {_one_of((*taken, 'no scheme'))}"
    if case.schemes and (case.view == PAST_2G or case.seq in ("held", "reuse")):
        return f"schemes do not go with {case.view or case.seq}"
    groups = absences(contract)
    if set(case.absent) - set().union(*(g for g in groups if set(g) <= set(case.absent))):
        permitted = [" with ".join(group) for group in groups]
        return f"{', '.join(case.absent)} cannot be left out, expected {_one_of(permitted or ['every operand'])}"
    if case.view not in ("", *(known := (*VIEWS, *LAYOUTS, FAR, PAST_2G, THREADS))):
        return f"{case.view!r} is not a view, expected one of {', '.join(known)}"
    if why := unsuited(contract, case.view):
        return why
    for name, (low, high) in contract.ranges.items():
        if low == 0 and sizes.get(str(high)) == 0 and _wide_enough(contract, name, sizes):
            return f"{name} has nothing to point to"
    return ""


def unsuited(contract: Contract, view: str) -> str:
    """Why no call of a contract has its operands laid out so, or ""."""
    if view in ("joint", *PITCHES) and not joined(contract):
        return f"view {view} needs two arrays whose rows can lie side by side"
    if view in LAYOUTS[:2] and all(len(o.dims) != 3 for o in contract.signature.of_kind(ARRAY)):
        return f"view {view} needs an array of 3 axes"
    kinds = {o.kind for o in contract.signature.operands}
    numbered = "Batch" in kinds or any(high == "P" for _, high in contract.ranges.values())
    if view == PAST_2G and not (("Pages" in kinds and numbered) or per_expert(contract)):
        return f"view {PAST_2G} needs a cache with a batch, or experts' weights with counts"
    return ""


def _refused_ranked(case: Case) -> str:
    """What is wrong with a call of several ranks."""
    contract, ranks = case.contract, dict(case.dims)["ranks"]
    if ranks > MOST_RANKS:
        return f"it has {ranks} ranks, expected at most {MOST_RANKS}"
    if case.batch or case.block_size or case.distinct or case.capture or case.via:
        return "a call of several ranks has no batch, pages, copies, capture nor provider"
    if case.view not in ("", "columns", "rows") or (case.view and not contract.dtypes.get("x", ("",))[1:]):
        return f"{case.view} is not a view of such a call, expected columns or rows"
    if case.seq not in ("", GROUPS):
        return f"{case.seq!r} is not a program of several ranks, expected {GROUPS}"
    if not case.fault:
        return ""
    if case.fault not in RANK_FAULTS:
        return f"{case.fault!r} is not a fault of ranks, expected one of {', '.join(RANK_FAULTS)}"
    needs = {"range": contract.ranges, "overflow": contract.fits, "shape": contract.dtypes, "dtype": contract.cases}
    if ranks < 2 or not needs.get(case.fault, True) or (case.fault == "shape" and not contract.cases):
        return f"it has no fault {case.fault}"
    return ""


def _refused_batch(case: Case) -> str:
    """What is wrong with the composition or the size of pages."""
    signature = case.contract.signature
    batch = next(iter(signature.of_kind("Batch")), None)
    paged = bool(signature.of_kind("Pages"))
    if case.batch and not batch:
        return "it takes no batch"
    if case.block_size and not (paged or batch):
        return "it takes no block_size"
    if not batch:
        return ""
    if (free := requests(case.batch)) is not None:
        return _refused_requests(free, dict(case.dims)["T"], case.block_size, written=bool(signature.mutated))
    if case.batch == "long" and (paged or len(batch.dims) > 1):
        return "long batches are for ops that need no cache of 128k positions"
    if case.batch == "deep" and "k" not in dict(case.dims) and "k" not in dict(case.attrs):
        return "deep batches are for ops with a k"
    if case.batch == CROWD and signature.mutated:
        return "crowd batches share pages, which this op would write"
    if case.batch in (known := (*COMPOSITIONS, CROWD)):
        return ""
    return f"{case.batch!r} is not a composition, expected {_one_of(known)}, or requests such as 1/5+4/130"


def _refused_requests(found: Sequence[Request], T: int, block_size: int, written: bool) -> str:
    if sum(r.q for r in found) != T:
        return f"its requests have {sum(r.q for r in found)} query rows, expected T = {T}"
    if any(a.q > DECODING and b.q <= DECODING for a, b in pairwise(found)):
        return f"requests of at most {DECODING} query rows must come first"
    if any(r.kv and r.kv < r.q for r in found) or max(r.kv for r in found) > LONGEST:
        return f"a request must see 0 keys, or at least its own query rows and at most {LONGEST}"
    for before, request in pairwise((Request(0, 0), *found)):
        if request.shared and request.shared > (most := shareable(before, request, block_size, written)):
            return f"a request shares {request.shared} pages with the one before, expected at most {most}"
    return ""


def _refused_fault(case: Case) -> str:
    contract, sizes = case.contract, dict(case.dims)
    if case.fault == "range" and not any(_wide_enough(contract, n, sizes) for n in contract.ranges):
        return "it has no index that could be out of range"
    if case.fault in ("dtype", "shape", "kind") and not contract.signature.of_kind(ARRAY):
        return "it has no array"
    if case.fault == "attribute" and not contract.attributes:
        return "it has no attribute"
    return "" if case.fault in ("", *FAULTS) else f"{case.fault!r} is not a fault, expected one of {', '.join(FAULTS)}"


def copyable(contract: Contract) -> bool:
    """Whether rows of a call may be copies of a few: where they are independent, and results are numbers."""
    return bool(contract.independent) and not any(result.kind == "Quantised" for result in contract.signature.results)


def _refused_copies(case: Case) -> str:
    """What is wrong with copies of few rows."""
    if not case.distinct:
        return ""
    if not 2 <= case.distinct <= LARGEST["distinct"]:
        return f"distinct is {case.distinct}, expected {DISTINCT}"
    if not copyable(case.contract):
        return f"distinct is for ops with independent rows or columns of numbers, and {case.op} has none"
    if case.schemes and any(case.contract.signature[n].kind != "Quantised" for n, _ in case.schemes):
        return "distinct does not go with schemes"
    if case.view in ("broadcast", FAR, PAST_2G, THREADS) or case.fault:
        return f"distinct does not go with {case.view or 'a fault'}"
    if case.batch and requests(case.batch) is None:
        return f"distinct needs a batch that is spelled out, such as 64*1/5, and {case.batch} is a name"
    return ""


def _refused_program(case: Case) -> str:
    if case.seq and case.seq not in PROGRAMS:
        return f"{case.seq!r} is not a program, expected one of {', '.join(PROGRAMS)}"
    if case.seq and case.seq not in (known := programs(case.contract)):
        return f"it has no program {case.seq!r}, expected one of {', '.join(known)}"
    if case.seq and (other := case.view or case.fault or "capture" * case.capture):
        return f"a program takes its operands as they are, without {other}"
    return ""


def _refused_capture(case: Case) -> str:
    if case.capture and (case.view or case.fault or case.distinct or case.seq):
        return "a captured call has no view, fault, copies nor program"
    if case.capture and (case.batch in (CROWD, "long") or dict(case.dims).get(case.contract.rows) == 0):
        return "a captured call has rows, and requests with pages of their own"
    return ""


def _unpaged(case: Case) -> list[str]:
    """Of batch and block_size, what the op needs and the case does not have."""
    signature = case.contract.signature
    batch, paged = bool(signature.of_kind("Batch")), bool(signature.of_kind("Pages"))
    needed = ("batch", batch, case.batch), ("block_size", paged or batch, case.block_size)
    return [name for name, needs, has in needed if needs and not has]


def _sizes(case: Case) -> list[str]:
    """Symbols in the shapes of present operands that neither attributes nor the batch bind."""
    signature = case.contract.signature
    present = [
        replace(o, fields=tuple(f for f in o.fields if f[0] not in case.absent)) if o.fields and case.absent else o
        for o in signature.operands
        if o.name not in case.absent and o.kind != "Batch"
    ]
    needed = dict.fromkeys(s for o in present for s in o.symbols())
    return [s for s in needed if s not in _bound(case)]


def _bound(case: Case) -> set[str]:
    """The symbols that attributes or the batch bind."""
    batches = case.contract.signature.of_kind("Batch")
    return {d for o in batches for d in o.dims if d != case.contract.rows} | set(case.contract.attributes)


def _one_of(names: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(names))
    return f"one of {', '.join(distinct)}" if len(distinct) > 1 else distinct[0]


def _wide_enough(contract: Contract, name: str, sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(s, 1) for d in contract.signature[name].dims for s in symbols(d))


@lru_cache(maxsize=256)
def elements(case: Case) -> int:
    """About how many numbers a case's operands and results hold, and what drawing them takes."""
    signature = case.contract.signature
    sizes: dict[str, int] = {**_whole(dict(case.attrs)), **dict(case.dims)}
    count = sizes.get("T", 1) * sizes.get("E", 0)  # an expert for each place is drawn from all of them
    slots = held_pages(case) * case.block_size
    if signature.of_kind("Batch"):
        q_lens, kv_lens = lengths(case.batch, sizes["T"], sizes.get("k", 0), case.block_size, case.stream)
        sizes = {"R": len(q_lens), "S": max(kv_lens, default=0), **sizes}
        held = sum(kv_lens)
        if case.distinct:  # copies share pages: two for each place, or 64 in all where a step writes elsewhere
            held = 64 * case.block_size + sum(q_lens) if signature.mutated else 2 * max(kv_lens, default=0)
        slots = max(slots, held + (len(kv_lens) + sum(spare(case.batch, len(kv_lens)))) * case.block_size)
    for operand in (*signature.operands, *(r for r in signature.results if not r.mutated)):
        if operand.name in case.absent:
            continue
        if operand.fields:
            count += slots * sum(evaluate(w, sizes) for f, w, _ in operand.fields if f not in case.absent)
        elif operand.kind != "Batch":
            count += math.prod(evaluate(d, sizes) for d in operand.dims)
    return count


def held_pages(case: Case) -> int:
    """Pages of a cache that no batch describes."""
    return max(PAGES, dict(case.dims).get("M", 0) + 2)


def _whole(attrs: Mapping[str, Any]) -> dict[str, int]:
    return {k: v for k, v in attrs.items() if isinstance(v, int) and not isinstance(v, bool)}
