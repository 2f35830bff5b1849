"""The shape language."""

import pytest

from porthal.hal import UsageError
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
