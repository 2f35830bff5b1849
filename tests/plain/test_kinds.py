"""A new kind of operand: its own class and a line in the registry, and everything else follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance import replay
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.inputs import MAKERS
from porthal.conformance.cases.values import Draw
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.judgement.saved import read, save
from porthal.conformance.runner.check import check
from porthal.hal import KINDS, Operand, bind, contract, create, narrow
from porthal.hal.contract import _contracts


@dataclass(frozen=True)
class StateSpec:
    """One state of a recurrent layer per request."""

    rows: int
    width: int
    dtype: str


@dataclass(frozen=True, eq=False)
class State(Operand):
    """Logical form: {"value": [rows, width], "step": int32 [rows]}."""

    Spec: ClassVar[type | None] = StateSpec
    typed: ClassVar[bool] = True
    spec: StateSpec
    native: Any

    def sizes(self, declared: Any) -> list[tuple[str, int]]:
        return declared.matched((self.spec.rows, self.spec.width))

    @classmethod
    def form(cls, spec: StateSpec) -> Any:
        return {"value": ((spec.rows, spec.width), spec.dtype), "step": ((spec.rows,), "int32")}

    def mapped(self, f: Any) -> State:
        return State(self.spec, self.native | {"value": f(self.native["value"])})


def decay(x: Any, state: Any) -> Any:
    """state' = state / 2 + x, one step further."""
    return State(state.spec, {"value": state.native["value"] / 2 + x, "step": state.native["step"] + 1})


def made(case: Case, operand: Any, sizes: Any, batch: Any) -> State:
    rows, width, dtype = sizes["T"], sizes["H"], case.dtype(operand.name)
    values = Draw(f"{case.stream}/{operand.name}", (rows, width), dtype).bell()
    return State(StateSpec(rows, width, dtype), {"value": narrow(values, dtype), "step": np.zeros(rows, np.int32)})


class Chip(Reference):
    """Owns the op; `wrong` forgets the step of the state."""

    name = "chip"
    wrong = False

    def decay(self, x: Any, state: State) -> State:
        value, step = state.native["value"], state.native["step"]
        value[...] = (value.astype(np.float64) / 2 + x.astype(np.float64)).astype(value.dtype)
        step += 0 if self.wrong else 1
        return state


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    KINDS["State"], MAKERS["State"] = State, made
    contract(
        "x[T, H], state!: State[T, H] -> state",
        dtypes={"x": ("float32", "float16"), "state": "x"},
        cost=lambda d, b: (2 * d.T * d.H, 3 * d.T * d.H * b.x),
        cases={"H": (8, 3)},
    )(decay)
    yield
    del KINDS["State"], MAKERS["State"], _contracts["decay"]


TOKEN = "decay,T=5,H=8,0"


def test_a_call_is_built_checked_executed_and_judged() -> None:
    assert check(Case.from_token(TOKEN), Bindings(Chip())).verdict == "PASS"
    wrong = Chip()
    wrong.wrong = True
    result = check(Case.from_token(TOKEN), Bindings(wrong))
    assert (result.verdict, result.message) == ("FAIL_VALUE", "state.step[0] is 0, expected 1")


def test_the_reference_runs_it_without_a_line_of_its_own() -> None:
    inputs = build(Case.from_token("decay,T=2,H=3,x:fp16,0"))
    state = inputs.operands["state"]
    ops = bind(backend=create("reference"), overrides={}, check=True)
    out = ops.decay(inputs.operands["x"], state.place(ops))
    assert isinstance(out, State) and sorted(ops.to_logical(out)) == ["step", "value"]


def test_it_is_saved_read_and_replayed(tmp_path: Any) -> None:
    inputs, got = build(Case.from_token(TOKEN)), {}
    assert replay(inputs, Chip(), returned=got.update).verdict == "PASS"
    again = read(save(inputs, got, tmp_path, "case", "chip"))
    for part, array in inputs.operands["state"].parts().items():
        np.testing.assert_array_equal(again.operands["state"].parts()[part], array)
    assert replay(again, Chip()).verdict == "PASS"


def test_its_dims_are_checked() -> None:
    inputs = build(Case.from_token(TOKEN))
    ops = bind(backend=Chip(), overrides={}, check=True)
    with pytest.raises(ValueError, match=r"^decay: state has H = 8, but H=7 elsewhere in the call$"):
        ops.decay(inputs.operands["x"][:, :7], inputs.operands["state"].place(ops))
    with pytest.raises(ValueError, match=r"^decay: state is ndarray, expected State$"):
        ops.decay(inputs.operands["x"], inputs.operands["x"])
