"""A call as two files: `porthal replay CALL --save DIR` and `porthal diff --save DIR` write NAME.npz and NAME.py there.

The script needs NumPy alone and measures what was returned; `porthal replay NAME.npz` judges the call again on any backend.
Keys of the .npz, which holds no Python objects; floats narrower than 32 bits are stored as float32, exactly:

    schema, op, version   of this form, and whose call it is, under which version of its contract
    call, token           what is called: the case's token, or a place in a model, where there is no token
    backend, level, permitted    where it ran and how it was judged; `permitted` is the level's factor on every budget
    dtype/NAME            the dtype that an operand or result has in the call
    in/NAME               an operand in logical form; a Batch as in/NAME.cu_q, .kv_len, .block_table and .block_size, Pages as
                          in/NAME.FIELD [slots, width], a Selection as in/NAME.indices and .length; absent ones are left out
    spec/NAME             the static facts of Weight, Pages and Selection, as JSON
    attr/NAME             an attribute
    golden/NAME           a result of the reference: float64, rounded once where the contract wants it exact, or integers
    budget/NAME           the error budget of a float result, element by element; 0 where it must be exact
    got/NAME              the same result from the backend, if any came; results in pages are got/NAME.FIELD
    chosen/NAME           a discrete choice as the backend made it, golden_chosen/NAME the reference's. Where scores say how
                          good it is, NAME.scores has those of each row's entries, highest first, as golden, budget and got:
                          a choice of other entries with equal scores is as right. A draw is compared as it is.

For rows that a contract leaves unspecified golden is NaN, and the budget infinite. What depends on a choice is golden at the
backend's own, or at the reference's where that is none.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from porthal.conformance.cases import Case
from porthal.conformance.golden import Golden, Spread
from porthal.conformance.inputs import Array, Inputs, build, observed, specified_rows, written_slots
from porthal.conformance.judge import budget, exactly_judged
from porthal.conformance.plan import Level
from porthal.conformance.verdicts import STRICTNESS
from porthal.hal import (
    Batch,
    Pages,
    PagesSpec,
    Rows,
    Selection,
    SelectionSpec,
    UsageError,
    Weight,
    WeightSpec,
    contracts,
    narrow,
)
from porthal.hal.dtypes import dtype, widen
from porthal.hal.signature import OperandSpec

SCHEMA = 1
BATCH = ("cu_q", "kv_len", "block_table", "block_size")
SCRIPT = '''\
"""Prints how far each result of the call beside this file is from the reference: needs NumPy alone."""
import numpy as np

call = np.load(__file__[:-3] + ".npz")
print(f"{call['call']} on {call['backend']}: permitted is {call['permitted']} times the error budget")
for name in (key[7:] for key in call if key.startswith("golden/")):
    golden, got = call[f"golden/{name}"].astype(float), call.get(f"got/{name}")
    if got is None or got.shape != golden.shape:
        print(f"{name}: {'nothing' if got is None else got.shape} came back, expected {golden.shape}")
        continue
    budget = call.get(f"budget/{name}", np.zeros(golden.shape))
    same = (got == golden) | (np.isnan(got) & np.isnan(golden)) | np.isinf(budget)
    with np.errstate(all="ignore"):
        times = np.where(same, 0, np.where(np.isfinite(got), abs(got - golden) / budget, np.inf)).reshape(-1)
    worst = f"{times.max(initial=0):.3g} times its budget, at flat index {times.argmax() if times.size else None}"
    print(f"{name}: {(~same).sum()} of {same.size} differ, the worst by {worst}")
'''


# -- writing ---------------------------------------------------------------------------------------------------------


def save(
    inputs: Inputs, results: Mapping[str, Any], folder: Path, name: str, backend: str, level: Level = "bring-up"
) -> Path:
    """Write what went in, what came out, if anything, and what ought to have come; gives the .npz."""
    file, token = folder / f"{name}.npz", "" if inputs.met else inputs.case.token
    facts = {"schema": SCHEMA, "op": inputs.contract.name, "version": inputs.contract.version}
    ran = {"call": inputs.met or token, "token": token, "backend": backend, "level": level}
    arrays: dict[str, Any] = {**facts, **ran, "permitted": STRICTNESS[level].pointwise}
    for part in (_given(inputs), _returned(inputs, results), _wanted(Golden(inputs), results)):
        arrays.update(part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".py").write_text(SCRIPT, encoding="utf-8")
        np.savez_compressed(file, **arrays)
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from None
    return file


def _given(inputs: Inputs) -> Iterator[tuple[str, Any]]:
    for name, kind in inputs.spec.dtypes.items():
        yield f"dtype/{name}", kind
    for name, value in inputs.operands.items():
        if isinstance(value, (Weight, Pages, Selection)):
            yield f"spec/{name}", json.dumps(asdict(value.spec))
        for part, array in _parts(value):
            yield f"in/{name}{part}", _plain(array)
    for name, value in inputs.attrs.items():
        yield f"attr/{name}", value


def _returned(inputs: Inputs, results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in results.items():
        scored = name == inputs.contract.choice and inputs.contract.scores
        for part, array in _parts(value):
            if not array.dtype.hasobject:  # a kernel's None is no result
                yield f"dtype/{name}{part}", dtype(array)
                yield f"{'chosen' if scored else 'got'}/{name}{part}", _plain(array)


def _wanted(golden: Golden, results: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    contract, scored = golden.contract, ""
    spreads: Mapping[str, Spread] = {}
    if contract.choice and contract.scores:
        scored = contract.choice
        choice = yield from _scored(golden, scored, results.get(scored))
        spreads = golden.spread(contract.finish, choice) if contract.finish else {}
    elif not contract.choice:
        spreads = golden.exactly() if contract.exact else golden.spread()
    for result in contract.signature.results:
        if result.kind != "Pages" and result.name not in (*spreads, scored):
            for part, array in _parts(golden.results()[result.name]):
                yield f"golden/{result.name}{part}", array
    for key, spread in spreads.items():
        yield from _judged(golden, key, spread)


def _scored(golden: Golden, name: str, got: Any) -> Generator[tuple[str, Array], None, Any]:
    """A choice by the scores of what it chose, in falling order, NaN where a row has no more entries; gives the choice at
    which to go on."""
    wanted = golden.results()[name]
    for part, array in _parts(wanted):
        yield f"golden_chosen/{name}{part}", array
    spread = None if golden.contract.exact else golden.scores()
    value = golden.call(golden.contract.scores) if spread is None else spread.value
    value = np.where(np.isnan(value), -np.inf, value)
    most = np.zeros(value.shape) if spread is None else np.where(np.isfinite(value), budget(spread, "float32"), 0)
    alike = [a.shape for _, a in _parts(got)] == [a.shape for _, a in _parts(wanted)]
    for kind, chosen in (("golden", wanted), ("got", got))[: 1 + alike]:
        ids = next(_parts(chosen))[1].reshape(len(value), -1).astype(np.int64)
        kept = np.where((ids >= 0) & (ids < value.shape[1]), ids, 0)
        there = (ids == kept) if value.shape[1] else np.zeros(ids.shape, bool)
        found = np.where(there, np.take_along_axis(value, kept, 1), np.nan) if value.shape[1] else there + np.nan
        yield f"{kind}/{name}.scores", -np.sort(-found, axis=1)
    yield f"budget/{name}.scores", np.broadcast_to(2 * most.max(1, initial=0)[:, None], found.shape)
    return got if alike and there.all() else wanted


def _judged(golden: Golden, key: str, spread: Spread) -> Iterator[tuple[str, Array]]:
    """The golden value of one float result, and its budget."""
    inputs = golden.inputs
    name, _, part = key.partition(".")
    kind = inputs.operands[name].spec.dtype if part else golden.shapes[name][1]
    g, b = spread.value.copy(), budget(spread, kind)
    if exactly_judged(inputs, g):
        g, b = widen(narrow(g, kind)), np.zeros(g.shape)
    if part:  # the spread is that of the slots that are written
        before: Pages = inputs.operands[name]
        written, all_g = written_slots(inputs, before), widen(before.native[part]).copy()
        all_b = np.zeros(all_g.shape)
        all_g[written], all_b[written] = g, b
        g, b = all_g, all_b
    elif (rows := specified_rows(inputs, name)) is not None:
        g[rows:], b[rows:] = np.nan, np.inf
    yield f"golden/{key}", g
    yield f"budget/{key}", b


def _parts(value: Any) -> Iterator[tuple[str, Array]]:
    """The arrays of an operand or result, with what follows its name."""
    if isinstance(value, Batch):
        named: Mapping[str, Any] = {name: getattr(value, name) for name in BATCH}
    elif isinstance(value, (Selection, Rows)):
        named = (value.native if isinstance(value, Selection) else value)._asdict()
    elif isinstance(value, (Pages, dict)):
        named = value.native if isinstance(value, Pages) else value
    else:
        if value is not None:
            yield "", narrow(value.native, value.spec.dtype) if isinstance(value, Weight) else value
        return
    yield from ((f".{part}", np.asarray(array)) for part, array in named.items())


def _plain(array: Array) -> Array:
    """Floats narrower than 32 bits as float32, which holds them exactly."""
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype == np.float16 else array


# -- reading ---------------------------------------------------------------------------------------------------------


def call(name: str) -> Inputs:
    """The call that a token describes, or that stands in a file NAME.npz."""
    if name.endswith(".npz"):
        return read(name)
    case = Case.from_token(name)
    if case.fault:
        raise UsageError(f"case token {name!r} is a deliberate mistake, of which there is nothing to save: choose another")
    return build(case)


def read(file: Path | str) -> Inputs:
    """The call in a file that `save` wrote, bit for bit; UsageError says what is wrong with any other."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            kept = dict(stored)
    except Exception as error:  # whatever zip, zlib and NumPy make of other bytes
        why = getattr(error, "strerror", None) or "it is no whole .npz"
        raise UsageError(f"cannot read {file}: {why}; expected one that --save wrote") from None
    try:
        return _call(kept)
    except KeyError as error:
        raise UsageError(f"{file} lacks {error}: save it again") from None
    except (UsageError, ValueError, TypeError) as error:
        raise UsageError(f"{file} holds no call for this porthal: {error}") from None


def _call(kept: Mapping[str, Array]) -> Inputs:
    if kept["schema"] != SCHEMA:
        raise UsageError(f"its schema is {kept['schema']}, expected {SCHEMA}; save it again")
    op = str(kept["op"])
    if op not in contracts():
        raise UsageError(f"unknown op {op!r}, known are {', '.join(contracts())}")
    contract = contracts()[op]
    if kept["version"] != contract.version:
        raise UsageError(f"its {op} has version {kept['version']}, expected {contract.version}; save it again")
    operands = {operand.name: _operand(operand, kept) for operand in contract.signature.operands}
    attrs = {name: kept[f"attr/{name}"].item() for name in contract.attributes}
    if token := str(kept["token"]):
        return Inputs(Case.from_token(token), operands, attrs, contract.spec(operands, attrs))
    return replace(observed(contract, operands, attrs), met=str(kept["call"]))


def _operand(operand: OperandSpec, kept: Mapping[str, Array]) -> Any:
    name = operand.name
    if operand.kind == "Batch":
        *arrays, size = (kept[f"in/{name}.{part}"] for part in BATCH)
        return Batch(*arrays, int(size))
    if operand.kind == "Selection":
        spec = SelectionSpec(**json.loads(str(kept[f"spec/{name}"])))
        return Selection(spec, Rows(*(kept[f"in/{name}.{part}"] for part in Rows._fields)))
    if operand.optional and kept.keys().isdisjoint((f"dtype/{name}", f"in/{name}")):
        return None
    kind = str(kept[f"dtype/{name}"])
    if operand.kind == "array":
        return narrow(kept[f"in/{name}"], kind)
    facts = json.loads(str(kept[f"spec/{name}"]))
    if operand.kind == "Weight":
        return Weight(WeightSpec(**facts | {"shape": tuple(facts["shape"])}), narrow(kept[f"in/{name}"], kind))
    fields = tuple((field, width) for field, width in facts["fields"])
    native = {field: narrow(kept[f"in/{name}.{field}"], kind) for field, _ in fields}
    return Pages(PagesSpec(**facts | {"fields": fields}), native)
