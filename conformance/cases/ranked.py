"""Calls of several ranks: which are tested, and what each rank gives.

A case has as many ranks as its size `ranks` says; with seq=groups twice as many, in two groups at once. Of a symbol that may
differ among ranks the case has the largest size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.domain import first_float, options
from porthal.conformance.cases.inputs import Array, Inputs
from porthal.conformance.cases.legal import GROUPS, RANK_FAULTS, refusal
from porthal.conformance.cases.values import RECIPES, Draw, recipe
from porthal.conformance.level import level_of
from porthal.hal import Communicator, CommunicatorSpec
from porthal.hal.contract import Contract
from porthal.hal.dtypes import is_float, narrow, numpy_dtype
from porthal.hal.signature import ARRAY, evaluate

WORLDS = (1, 2, 3, 4, 8)
SIZES = {"H": 5, "n": 3, "T": 4, "N": 7, "k": 2, "E": 5}  # of a plain call
LONG = 2**16 + 3  # of one row
TAG = 2**20  # elements of a rank, where its number and the element's are one number


# -- what each rank gives ------------------------------------------------------------------------------------------------


def world(case: Case) -> int:
    """The processes that a case takes."""
    return dict(case.dims)["ranks"] * (2 if case.seq == GROUPS else 1)


def victim(case: Case) -> int:
    """The rank at fault, where one is."""
    return case.seed % dict(case.dims)["ranks"]


def given(case: Case, rank: int, group: int = 0) -> Inputs:
    """What a rank of a group gives, in logical form."""
    contract, dims = case.contract, dict(case.dims)
    sizes = {**case.attributes, **dims, "rank": rank}
    for name in contract.uneven if case.fault != "range" else ():  # 7, 6, 0, 4, 3, 0, ...
        sizes[name] = 0 if rank % 3 == 2 else max(dims[name] - rank, 0)
    operands: dict[str, Any] = {}
    for operand in contract.signature.operands:
        if operand.kind != ARRAY:
            operands[operand.name] = Communicator(CommunicatorSpec(rank, dims["ranks"]), None)
            continue
        shape, kind = tuple(evaluate(d, sizes) for d in operand.dims), case.dtype(operand.name)
        key = f"{case.stream}/{group}/{rank}/{operand.name}"
        chosen = case.recipe(operand.name)
        if not is_float(kind) and chosen == "special":
            chosen = "tagged"
        values = RECIPES["wide" if not is_float(kind) and chosen == "normal" else chosen](Draw(key, shape, kind, sizes))
        narrowed = is_float(kind)
        operands[operand.name] = narrow(values.astype(np.float64), kind) if narrowed else values.astype(numpy_dtype(kind))
    return Inputs(case, operands, case.attributes, contract.spec(operands, case.attributes))


@recipe
def tagged(draw: Draw) -> Array:
    """Numbers that say where they come from: the rank and the element, as far as the dtype holds them."""
    rank, at = draw.sizes.get("rank", 0), np.arange(np.prod(draw.shape, dtype=np.int64)).reshape(draw.shape)
    if draw.dtype in ("int32", "float32"):
        return rank * TAG + at
    return (rank * 37 + at * 7) % 251 - (0 if draw.dtype == "uint8" else 125)


def origin(value: Any) -> str:
    """What a tagged number of 32 bits says of itself."""
    return f"element {int(value) % TAG} of rank {int(value) // TAG}"


def _split(draw: Draw, to: Sequence[int], counts: Sequence[int]) -> Array:
    send = np.zeros(draw.shape, np.int64)
    for rank, count in zip(to, counts):
        send[rank] += count
    return send


@recipe
def unlike(draw: Draw) -> Array:
    """Of unlike magnitude from rank to rank, with all bits that float32 has: a sum shows in which order it was made."""
    turn = (draw.sizes.get("rank", 0) + np.arange(np.prod(draw.shape, dtype=np.int64)).reshape(draw.shape)) % 3
    return draw.bell() / 3 * 2.0 ** (-7 * turn)


@recipe
def splits(draw: Draw) -> Array:
    """Some rows for each rank, and some that stay."""
    cuts = np.sort(draw.integers(0, draw.sizes["N"] + 1))
    return np.diff(cuts, prepend=0)


@recipe
def silent(draw: Draw) -> Array:
    """One rank sends nothing and is sent nothing."""
    send = splits(draw)
    send[-1] = 0
    return send * (draw.sizes["rank"] != draw.shape[0] - 1)


@recipe
def onto(draw: Draw) -> Array:
    """Everything goes to the last rank."""
    return _split(draw, [draw.shape[0] - 1], [draw.sizes["N"]])


@recipe
def shifted(draw: Draw) -> Array:
    """Everything goes to the next rank."""
    return _split(draw, [(draw.sizes["rank"] + 1) % draw.shape[0]], [draw.sizes["N"]])


@recipe
def kept(draw: Draw) -> Array:
    """Everything goes to the rank itself."""
    return _split(draw, [draw.sizes["rank"]], [draw.sizes["N"]])


@recipe
def mirrored(draw: Draw) -> Array:
    """One row for each rank with whom it makes up the last one, the rest for the first."""
    rank, last = draw.sizes["rank"], draw.shape[0] - 1
    one = min(draw.sizes["N"], 1)
    return _split(draw, [last - rank, 0], [one, draw.sizes["N"] - one])


# -- which are tested ----------------------------------------------------------------------------------------------------


def ranked_cases(contract: Contract, level: str) -> list[Case]:
    """The cases of a collective at a level, in order."""
    made = _made(contract, level_of(level).thorough)
    found = {case.token: case for case in made if not refusal(case)}
    return list(found.values())


def _made(contract: Contract, thorough: bool) -> Iterator[Case]:
    first = first_float(contract)
    kinds = contract.dtypes[first] if first else ("",)
    for turn, ranks in enumerate(WORLDS):
        for kind in kinds if thorough or ranks == 3 else (kinds[turn % len(kinds)],):
            yield _case(contract, ranks, dtypes=((first, kind),) if first else ())
    yield _case(contract, 2, {s: v[0] for s, v in contract.cases.items()}, dtypes=((first, "bfloat16"),) if first else ())
    for ranks in (3, 4, 8) if thorough else (3,):
        for operand in contract.signature.of_kind(ARRAY):
            yield from (_case(contract, ranks, recipes=((operand.name, r),)) for r in options(contract, operand.name)[1:])
        for name, values in contract.cases.items():
            yield from (_case(contract, ranks, {name: value}) for value in values[1:])
        for payload in contract.cases.get("payload", ())[1:]:
            yield _case(contract, ranks, {"payload": payload, "H": 130}, recipes=((first, "normal"),))
        if first:
            yield from (_case(contract, ranks, view=view) for view in ("columns", "rows"))
        long = next((s for s in ("H", "n") if s in contract.signature.symbols()), "")
        yield from [_case(contract, ranks, {long: LONG})] * bool(long)  # messages that are sent in another way than short ones
    for ranks in (2, 4) if thorough else (2,):
        yield _case(contract, ranks, seq=GROUPS)
    for fault in RANK_FAULTS:
        for seed in range(3) if thorough else (1,):
            yield _case(contract, 3, fault=fault, seed=seed)


def _case(contract: Contract, ranks: int, changed: Any = None, **fields: Any) -> Case:
    """A plain call of so many ranks but for what is changed, with room for all that may arrive."""
    symbols = [s for s in (*contract.signature.symbols(), *contract.attributes) if s != "ranks"]
    sizes = {**{s: SIZES[s] for s in symbols if s in SIZES}, **{s: v for s, v in (changed or {}).items() if s in symbols}}
    if "M" in symbols and "M" not in (changed or {}):
        sizes["M"] = ranks * sizes["N"] * sizes.get("k", 1)
    attrs = contract.attributes
    dims = [("ranks", ranks), *((s, n) for s, n in sorted(sizes.items()) if s not in attrs)]
    given_attrs = [(s, n) for s, n in sorted(sizes.items()) if s in attrs and n != attrs[s].default]
    case = Case(contract.name, tuple(dims), tuple(given_attrs))
    if fields.get("fault") == "overflow" and "M" in sizes:
        where = "attrs" if "M" in attrs else "dims"
        fields[where] = tuple((dict(getattr(case, where)) | {"M": 1}).items())
    return replace(case, **fields)
