"""The shape language, and what contracts make of it."""

import numpy as np
import pytest

from porthal.hal import CallSpec, Contract, UsageError, contracts
from porthal.hal.signature import evaluate, parse, unify


def test_every_kind_of_operand_is_read() -> None:
    s = parse(
        "x[T, H], w: Weight[N, H], kv!: Pages{c[C], kp[R]?}, sel: Selection[T, k], b: Batch[T], z[N]? -> y[T, N], kv"
    )
    assert [(o.name, o.kind) for o in s.operands] == [
        ("x", "array"),
        ("w", "Weight"),
        ("kv", "Pages"),
        ("sel", "Selection"),
        ("b", "Batch"),
        ("z", "array"),
    ]
    assert s["kv"].fields == (("c", "C", False), ("kp", "R", True))
    assert [o.name for o in s.operands if o.optional] == ["z"]
    assert [o.name for o in s.mutated] == ["kv"]
    assert s["y"].dims == ("T", "N")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x[T]", "has no '->'"),
        ("x!: Pages{a[A]} -> y[T]", "mutates x without returning it"),
        ("x[T] -> x", "not marked '!'"),
        ("x: Tensor[T] -> y[T]", "expected one of array, Weight"),
        ("x[T -> y[T]", "cannot read operand"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


def test_dims_are_solved_for_their_one_unknown() -> None:
    env = {"C": 512}
    assert unify("C+R", 576, env) and env["R"] == 64
    assert unify("2*I", 96, env) and env["I"] == 48
    assert not unify("2*I2", 97, dict(env))
    assert unify("n+1", 4, env) and env["n"] == 3
    assert evaluate("N*D+N*R", {"N": 4, "D": 32, "R": 64}) == 384
    with pytest.raises(KeyError):
        unify("A+B", 7, {})


def test_results_are_named_only_where_all_are_there_and_no_more() -> None:
    add, route = contracts()["add"], contracts()["moe_route"]
    assert add.named(1) == {"y": 1}
    assert list(route.named((1, 2)).values()) == [1, 2]
    for contract, out, message in ((add, (1, 2), "add returned 2 results, expected 1"), (route, 1, "returned 1 results")):
        with pytest.raises(UsageError, match=message):
            contract.named(out)


def test_a_range_may_end_at_an_attribute() -> None:
    def pick(ids, *, most: int):
        """Ids below `most`."""

    dtypes = {"ids": "int32", "y": "ids"}
    signature = parse("ids[T] -> y[T]")
    contract = Contract(pick, signature, dtypes=dtypes, cost=lambda d, b: (0, 0), ranges={"ids": (0, "most")})
    spec = CallSpec({"T": 2}, {"ids": "int32"}, {"most": 3}, {})
    assert contract.bounds("ids", spec) == (0, 3)
    contract.check_values({"ids": np.array([0, 2])}, spec, np.asarray)
    with pytest.raises(UsageError, match=r"^pick: ids\[1\] is 3, expected 0 to 2$"):
        contract.check_values({"ids": np.array([0, 3])}, spec, np.asarray)
