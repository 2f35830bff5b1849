"""A call as two files: `porthal replay CALL --save DIR` and `porthal diff --save DIR` write NAME.npz and NAME.py there.

The script needs NumPy alone and measures what was returned; `porthal replay NAME.npz` judges the call again on any backend.
Keys of the .npz, which holds no Python objects; floats narrower than 32 bits are stored as float32, exactly:

    schema, op, version   the version of this form, the op called, and the version of its contract
    call, token           what is called: the case's token, or a place in a model, where there is no token
    backend, level, permitted    where it ran and how it was judged; `permitted` is the level's factor on every budget
    dtype/NAME            the dtype that an operand or result has in the call
    in/NAME               an operand in logical form; a Batch as in/NAME.cu_q, .kv_len, .block_table and .block_size, Pages as
                          in/NAME.FIELD [slots, width], a Selection as in/NAME.indices and .length, a Weight or Quantised under
                          a scheme as in/NAME.codes, .scale and for some .whole; absent ones are left out
    spec/NAME             the static facts of an operand that has any, as JSON
    attr/NAME             an attribute
    golden/NAME           a result of the reference: float64, rounded once where the contract wants it exact, or integers
    budget/NAME           the error budget of a float result, element by element; 0 where it must be exact
    got/NAME              the same result from the backend, if any came; where it has parts they are got/NAME.PART
    chosen/NAME           a discrete choice as the backend made it, golden_chosen/NAME the reference's. Where scores say how
                          good it is, NAME.scores has those of each row's entries, highest first, as golden, budget and got:
                          a choice of other entries with equal scores is right too. A draw is compared as it is,
                          and so are codes and scales.

For rows that a contract leaves unspecified golden is NaN, and the budget infinite. What depends on a choice is golden at the
backend's choice, or at the reference's where the backend made no valid one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.inputs import Array, Inputs, observed, specified_rows, written_slots
from porthal.conformance.cases.steps import first
from porthal.conformance.judgement.codes import coded
from porthal.conformance.judgement.copies import one_of_each
from porthal.conformance.judgement.golden import Golden, Spread
from porthal.conformance.judgement.judge import budget, exactly_judged
from porthal.conformance.level import BRING_UP, level_of
from porthal.hal import KINDS, Operand, Pages, UsageError, contracts, narrow
from porthal.hal.dtypes import dtype, widen
from porthal.hal.signature import ARRAY, OperandSpec

SCHEMA = 1
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
    inputs: Inputs, results: Mapping[str, Any], folder: Path, name: str, backend: str, level: str = BRING_UP.name
) -> Path:
    """Write what went in, what came out, if anything, and what the reference gives; returns the path of the .npz.

    Of a call made of copies one of each is written."""
    if inputs.copies:
        results = one_of_each(inputs, results) if results else {}
        inputs = inputs.copies.small
    file, token = folder / f"{name}.npz", "" if inputs.origin else inputs.case.token
    facts = {"schema": SCHEMA, "op": inputs.contract.name, "version": inputs.contract.version}
    ran = {"call": inputs.origin or token, "token": token, "backend": backend, "level": level}
    arrays: dict[str, Any] = {**facts, **ran, "permitted": level_of(level).pointwise}
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
        if isinstance(value, Operand) and value.Spec:
            yield f"spec/{name}", json.dumps(value.facts())
            value = _formed(type(value), value.spec, value.parts())
        for part, array in _parts(value):
            yield f"in/{name}{part}", _plain(array)
    for name, value in inputs.attrs.items():
        yield f"attr/{name}", value


def _returned(inputs: Inputs, results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in results.items():
        scored = name == inputs.contract.choice and inputs.contract.scores
        for part, array in _parts(value):
            if not array.dtype.hasobject:  # a kernel's None is not a result
                yield f"dtype/{name}{part}", dtype(array)
                yield f"{'chosen' if scored else 'got'}/{name}{part}", _plain(array)


def _wanted(golden: Golden, results: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    contract, scored = golden.contract, ""
    spreads: Mapping[str, Spread] = {}
    if contract.choice and contract.scores:
        scored = contract.choice
        got, wanted = results.get(scored), golden.results()[scored]
        yield from _scored(golden, wanted, got)
        choice = got if _in_range(golden, wanted, got) else wanted
        spreads = golden.spread(contract.finish, choice) if contract.finish else {}
    elif not contract.choice:
        spreads = golden.exactly() if contract.exact else golden.spread()
    codes = {part.key for part in coded(golden.inputs, spreads)}
    floats = {key: spread for key, spread in spreads.items() if key not in codes}
    for name, value in golden.results().items():
        for part, array in _parts(value):
            if name != scored and f"{name}{part}" not in floats:
                yield f"golden/{name}{part}", array
    for key, spread in floats.items():
        yield from _judged(golden, key, spread)


def _scored(golden: Golden, wanted: Any, got: Any) -> Iterator[tuple[str, Array]]:
    """A choice by the scores of what it chose, in falling order, NaN where a row has no more entries."""
    name = golden.contract.choice
    for part, array in _parts(wanted):
        yield f"golden_chosen/{name}{part}", array
    value, most = _scores(golden)
    for kind, chosen in (("golden", wanted), ("got", got))[: 1 + _alike(wanted, got)]:
        ids, valid = _ids(chosen, value)
        found = np.full(ids.shape, np.nan)
        if value.shape[1]:
            found = np.where(valid, np.take_along_axis(value, np.where(valid, ids, 0), 1), np.nan)
        yield f"{kind}/{name}.scores", -np.sort(-found, axis=1)
    yield f"budget/{name}.scores", np.broadcast_to(2 * most.max(1, initial=0)[:, None], found.shape)


def _scores(golden: Golden) -> tuple[Array, Array]:
    """The scores behind a choice, and the budget of each."""
    if golden.contract.exact:
        value = golden.call(golden.contract.scores)
        return np.where(np.isnan(value), -np.inf, value), np.zeros(value.shape)
    spread = golden.scores()
    value = np.where(np.isnan(spread.value), -np.inf, spread.value)
    return value, np.where(np.isfinite(value), budget(replace(spread, value=value), "float32"), 0)


def _alike(wanted: Any, got: Any) -> bool:
    return [a.shape for _, a in _parts(got)] == [a.shape for _, a in _parts(wanted)]


def _ids(chosen: Any, value: Array) -> tuple[Array, Array]:
    """The ids of a choice [rows, k], and which of them are candidates."""
    ids = next(_parts(chosen))[1].reshape(len(value), -1).astype(np.int64)
    return ids, (ids >= 0) & (ids < value.shape[1])


def _in_range(golden: Golden, wanted: Any, got: Any) -> bool:
    """Whether the rest of the results can be computed at the choice that was returned."""
    return _alike(wanted, got) and bool(_ids(got, _scores(golden)[0])[1].all())


def _judged(golden: Golden, key: str, spread: Spread) -> Iterator[tuple[str, Array]]:
    """The golden value of one float result, and its budget."""
    inputs = golden.inputs
    name, _, part = key.partition(".")
    kind = inputs.operands[name].spec.dtype if part else golden.shapes[name][1]
    g, b = spread.value.copy(), budget(spread, kind)
    if exactly_judged(inputs, g):
        g, b = widen(narrow(g, kind)), np.zeros(g.shape)
    before = inputs.operands.get(name)
    if part and isinstance(before, Pages):  # the spread is that of the slots that are written
        written, all_g = written_slots(inputs, before), widen(before.native[part]).copy()
        all_b = np.zeros(all_g.shape)
        all_g[written], all_b[written] = g, b
        g, b = all_g, all_b
    elif not part and (rows := specified_rows(inputs)) is not None:
        g[rows:], b[rows:] = np.nan, np.inf
    yield f"golden/{key}", g
    yield f"budget/{key}", b


def _parts(value: Any) -> Iterator[tuple[str, Array]]:
    """The arrays of an operand or result, with what follows its name."""
    if isinstance(value, (Operand, dict)):
        parts = value.parts() if isinstance(value, Operand) else value
        yield from ((_suffix(part), np.asarray(array)) for part, array in parts.items())
    elif value is not None:
        yield "", value


def _suffix(part: str) -> str:
    """What follows the name of an operand: nothing where the part is all of a weight."""
    return "" if part == "w" else f".{part}"


def _plain(array: Array) -> Array:
    """Floats narrower than 32 bits as float32, which holds them exactly."""
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype == np.float16 else array


# -- reading ---------------------------------------------------------------------------------------------------------


def call(name: str) -> Inputs:
    """The call that a token describes, or that is in a file NAME.npz."""
    if name.endswith(".npz"):
        return read(name)
    case = Case.from_token(name)
    if case.fault:
        raise UsageError(f"case token {name!r} is a deliberate mistake, with nothing to save: take one without fault=")
    if case.contract.collective:
        raise UsageError(f"case token {name!r} is a call of several ranks, of which none has all: replay it without --save")
    if case.capture:
        raise UsageError(f"case token {name!r} is several calls in one memory: save one of them, as `replay` names it")
    return replace(first(case), case=case)  # of a program, the first step


def read(file: Path | str) -> Inputs:
    """The call in a file that `save` wrote, bit for bit; UsageError says what is wrong with any other."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            kept = dict(stored)
    except Exception as error:  # zip, zlib and NumPy raise many kinds
        why = getattr(error, "strerror", None) or "it is not a whole .npz"
        raise UsageError(f"cannot read {file}: {why}; expected a file that --save wrote") from None
    try:
        return _call(kept)
    except KeyError as error:
        raise UsageError(f"{file} lacks {error}: save it again") from None
    except (UsageError, ValueError, TypeError) as error:
        raise UsageError(f"{file} does not hold a call for this porthal: {error}") from None


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
    return replace(observed(contract, operands, attrs), origin=str(kept["call"]))


def _operand(operand: OperandSpec, kept: Mapping[str, Array]) -> Any:
    name, given = operand.name, f"in/{operand.name}"
    if operand.optional and kept.keys().isdisjoint((f"dtype/{name}", given)):
        return None
    dtype = str(kept[f"dtype/{name}"]) if operand.typed else ""
    if operand.kind == ARRAY:
        return narrow(kept[given], dtype)
    kind = KINDS[operand.kind]
    spec = kind.spec_of(json.loads(str(kept[f"spec/{name}"]))) if kind.Spec else None
    parts = {part: kept[f"{given}{_suffix(part)}"] for part in kind.names(spec)}
    return kind.of(spec, _formed(kind, spec, parts) if kind.Spec else parts)


def _formed(kind: type[Operand], spec: Any, parts: Mapping[str, Array]) -> dict[str, Array]:
    """The parts in the dtypes that their kind gives them."""
    return {part: narrow(parts[part], dtype) for part, (_, dtype) in kind.form(spec).items()}
