"""What is chosen where the logits are not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest

from porthal.hal import contracts
from tests.oracles.draws import settings

ops = {name: contract.reference for name, contract in contracts().items()}


@pytest.mark.parametrize("op", ["argmax", "sample", "speculative_verify"])
def test_a_row_that_is_not_finite_gives_its_argmax(op: str) -> None:
    """NaN counts as -inf: such a row has one answer, whatever is drawn; `check_finite` says that it is not one."""
    nan, inf = math.nan, math.inf
    rows = {(nan, nan, nan): 0, (-inf, -inf, -inf): 0, (-inf, nan, -inf): 0, (0.0, inf, inf): 1, (inf, nan, 0.0): 0}
    for row, wanted in {**rows, (nan, -inf, 0.5): 2}.items():
        logits = np.array([row])
        for u in (0.0, 0.999):
            if op == "argmax":
                assert ops[op](logits) == wanted
            elif op == "sample":
                assert ops[op](logits, np.full(1, u), *settings(1)) == wanted
            else:
                tokens = ops[op](np.stack([logits, logits], 1), np.array([[1]]), np.full((1, 2), u), *settings(1))
                assert tokens.tolist() == [[1, 1] if wanted == 1 else [wanted, -1]]


def test_greedy_verification() -> None:
    greedy = np.array([[[0.0, 2, 1], [3, 3, 0], [0, 0, 9]]] * 3)
    drafts = np.array([[1, 0], [1, 1], [2, 0]])
    got = ops["speculative_verify"](greedy, drafts, np.zeros((3, 3)), *settings(3, temperature=0))
    assert got.tolist() == [[1, 0, 2], [1, 0, -1], [1, -1, -1]]  # equal logits: the lowest id
