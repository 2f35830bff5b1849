"""Defects by people who had seen no case: they can be planted, and their score is told as promised."""

import json

import pytest

from porthal.cli import main
from porthal.conformance.selftest import outside as module
from porthal.conformance.selftest.outside import PARTS, Score, Tried, attempt, outside, self_test
from porthal.conformance.selftest.planting import edited
from porthal.conformance.selftest.page import by_others
from porthal.hal import UsageError, contracts


def test_every_edit_applies():
    """Each snippet stands exactly once, and what comes of it compiles."""
    for d in outside().values():
        planted = edited(d.source, d.edits, d.key)
        if not d.native:
            compile(planted, d.key, "exec")


def test_a_third_is_held():
    parts = [d.part for d in outside().values()]
    assert {d.op for d in outside().values()} <= set(contracts())
    assert (len(parts), {part: parts.count(part) for part in PARTS}) == (278, {"open": 188, "held": 90})
    assert all(d.family and d.story and d.dtypes for d in outside().values())


def test_the_first_case_that_fails_is_told():
    tried = attempt(("bring-up", "take_rows/one-row-per-thread-block-of-1024"))
    assert tried.token.startswith("take_rows,") and tried.verdict == "FAIL_VALUE" and tried.cases > 1
