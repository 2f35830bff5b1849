"""A case as files that need no porthal: `porthal replay TOKEN --save DIR` writes case.npz and check.py there.

Keys of case.npz; floats of at most 32 bits are stored as float32, which holds all of them exactly:

    token, backend, level, permitted    what was run; `permitted` is the level's factor on every budget
    dtype/NAME            the dtype that an operand or result has in the call
    in/NAME               an operand in logical form; a Batch as in/NAME.cu_q, .kv_len, .block_table and .block_size, Pages as
                          in/NAME.FIELD [slots, width], a Selection as in/NAME.indices and .length; absent ones are left out
    attr/NAME             an attribute
    golden/NAME           a result of the reference: float64, rounded once where the contract wants it exact, or integers
    budget/NAME           the error budget of a float result, element by element; 0 where it must be exact
    got/NAME              the same result from the backend; results in pages are got/NAME.FIELD
    chosen/NAME           a discrete choice as the backend made it, golden_chosen/NAME the reference's. Where scores say how
                          good it is, NAME.scores has those of each row's entries, highest first, as golden, budget and got:
                          a choice of other entries with equal scores is as right. A draw is compared as it is.

For rows that a contract leaves unspecified golden is NaN, and the budget infinite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from porthal.conformance.cases import Case
from porthal.conformance.golden import Golden, Spread
from porthal.conformance.inputs import Array, Inputs, build, specified_rows, written_slots
from porthal.conformance.judge import budget, exactly_judged
from porthal.conformance.plan import Level
from porthal.conformance.runner import Bench, execute
from porthal.conformance.verdicts import STRICTNESS
from porthal.hal import Backend, Batch, Pages, Rows, Selection, UsageError, Weight, narrow
from porthal.hal.dtypes import dtype, is_float, widen

CHECK = '''\
"""Prints how far each result of case.npz is from the reference: needs NumPy alone."""
import numpy as np

case = np.load(__file__.replace("check.py", "case.npz"))
print(f"{case['token']} on {case['backend']}: permitted is {case['permitted']} times the error budget")
for name in (key[4:] for key in case if key.startswith("got/")):
    got, golden = (case[f"{kind}/{name}"].astype(float) for kind in ("got", "golden"))
    budget = case[f"budget/{name}"] if f"budget/{name}" in case else np.zeros(golden.shape)
    same = (got == golden) | (np.isnan(got) & np.isnan(golden)) | np.isinf(budget)
    with np.errstate(all="ignore"):
        times = np.where(same, 0, np.where(np.isfinite(got), abs(got - golden) / budget, np.inf)).reshape(-1)
    worst = f"{times.max(initial=0):.3g} times its budget, at flat index {times.argmax() if times.size else None}"
    print(f"{name}: {(~same).sum()} of {same.size} differ, the worst by {worst}")
'''


def save(token: str, backend: Backend, folder: Path, level: Level = "bring-up") -> Path:
    """Run the case once more and write what went in, what came out and what ought to have come; gives the .npz."""
    case = Case.from_token(token)
    if case.fault:
        raise UsageError(f"case token {token!r} is a deliberate mistake, of which there is nothing to save: choose another")
    inputs = build(case)
    outcome = execute(Bench(backend).binding(inputs), inputs)
    if outcome.error:
        raise UsageError(f"{backend} gave no result to save: {outcome.error}")
    facts = {"token": case.token, "backend": str(backend), "level": level, "permitted": STRICTNESS[level].pointwise}
    arrays = {**facts, **dict(_given(inputs)), **dict(_found(inputs, outcome.results))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "check.py").write_text(CHECK, encoding="utf-8")
    np.savez_compressed(folder / "case.npz", **arrays)
    return folder / "case.npz"


def _given(inputs: Inputs) -> Iterator[tuple[str, Any]]:
    for name, kind in inputs.spec.dtypes.items():
        yield f"dtype/{name}", kind
    for name, value in inputs.operands.items():
        for part, array in _parts(value):
            yield f"in/{name}{part}", _plain(array)
    for name, value in inputs.attrs.items():
        yield f"attr/{name}", value


def _found(inputs: Inputs, results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    golden, contract = Golden(inputs), inputs.contract
    for name, value in results.items():
        scored = name == contract.choice and contract.scores
        for part, array in _parts(value):
            yield f"dtype/{name}{part}", dtype(array)
            yield f"{'chosen' if scored else 'got'}/{name}{part}", _plain(array)
    spreads: Mapping[str, Spread] = {}
    if contract.choice:
        wanted = golden.results()[contract.choice]
        if contract.scores:
            yield from _scored(golden, contract.choice, wanted, results[contract.choice])
        else:
            yield f"golden/{contract.choice}", wanted
        if contract.finish:
            spreads = golden.spread(contract.finish, results[contract.choice])
    else:
        spreads = golden.exactly() if contract.exact else golden.spread()
        for result in contract.signature.results:
            if result.kind != "Pages" and result.name not in spreads:
                for part, array in _parts(golden.results()[result.name]):
                    yield f"golden/{result.name}{part}", array
    for key, spread in spreads.items():
        yield from _judged(inputs, key, spread, results)


def _scored(golden: Golden, name: str, wanted: Any, got: Any) -> Iterator[tuple[str, Array]]:
    """A choice by the scores of what it chose, in falling order; NaN where a row has no more entries."""
    for part, array in _parts(wanted):
        yield f"golden_chosen/{name}{part}", array
    exact = golden.contract.exact
    spread = None if exact else golden.scores()
    value = golden.call(golden.contract.scores) if spread is None else spread.value
    value = np.where(np.isnan(value), -np.inf, value)
    most = np.zeros(value.shape) if spread is None else np.where(np.isfinite(value), budget(spread, "float32"), 0)
    for kind, chosen in (("golden", wanted), ("got", got)):
        ids = next(_parts(chosen))[1].reshape(len(value), -1).astype(np.int64)
        kept = np.where((ids >= 0) & (ids < value.shape[1]), ids, 0)
        there = (ids == kept) if value.shape[1] else np.zeros(ids.shape, bool)
        found = np.where(there, np.take_along_axis(value, kept, 1), np.nan) if value.shape[1] else there + np.nan
        yield f"{kind}/{name}.scores", -np.sort(-found, axis=1)
    yield f"budget/{name}.scores", np.broadcast_to(2 * most.max(1, initial=0)[:, None], found.shape)


def _judged(inputs: Inputs, key: str, spread: Spread, results: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    """The golden value of one float result, and its budget."""
    name, _, part = key.partition(".")
    kind = dtype(results[name][part] if part else results[name])
    g, b = spread.value.copy(), budget(spread, kind)
    if exactly_judged(inputs, g):
        g, b = widen(narrow(g, kind)), np.zeros(g.shape)
    if part:
        b[~written_slots(inputs, inputs.operands[name])] = 0
    elif (rows := specified_rows(inputs, name)) is not None:
        g[rows:], b[rows:] = np.nan, np.inf
    yield f"golden/{key}", g
    yield f"budget/{key}", b


def _parts(value: Any) -> Iterator[tuple[str, Array]]:
    """The arrays of an operand or result, with what follows its name."""
    if isinstance(value, Batch):
        named: Mapping[str, Any] = {n: getattr(value, n) for n in ("cu_q", "kv_len", "block_table", "block_size")}
    elif isinstance(value, (Selection, Rows)):
        named = (value.native if isinstance(value, Selection) else value)._asdict()
    elif isinstance(value, (Pages, dict)):
        named = value.native if isinstance(value, Pages) else value
    else:
        if value is not None:
            yield "", value.native if isinstance(value, Weight) else value
        return
    yield from ((f".{part}", np.asarray(array)) for part, array in named.items())


def _plain(array: Array) -> Array:
    return array.astype(np.float32) if is_float(dtype(array)) else array
