"""The tests' cost is stated in one place, told at the end of a run, and bounded."""

from tests.budgets import BUDGETS, PROOF, TESTS, Account

MOST = 1600  # CPU seconds of `make test`: a quarter of an hour on two cores, and a third of what CI may take


def test_every_folder_of_tests_has_a_budget():
    assert {file.parent.name for file in TESTS.glob("*/test_*.py")} == {*BUDGETS, *PROOF}


def test_budgets_are_within_what_all_may_cost():
    assert sum(BUDGETS.values()) <= MOST


def test_the_cost_of_a_folder_is_told_when_all_of_it_ran():
    account = Account()
    for file in (*TESTS.glob("house/test_*.py"), *TESTS.glob("native/test_*.py")):
        account.collected[file], account.seconds[file] = 3, 1.5
    files = len(list(TESTS.glob("house/test_*.py")))
    account.left[TESTS / "native" / "test_diff.py"] = 1
    assert list(account.folders()) == [("house", 1.5 * files)]
    account.chosen = {TESTS / "house" / "test_homes.py"}
    assert list(account.folders()) == []
