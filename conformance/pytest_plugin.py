"""`pytest --porthal-backend=NAME [--porthal-level=LEVEL]`: one test per case, its id the case's token.

Without the option nothing is imported and nothing is collected.
"""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("porthal")
    group.addoption("--porthal-backend", metavar="NAME", help="test the conformance of this backend, case by case")
    group.addoption("--porthal-level", default="bring-up", choices=("bring-up", "standard", "strict"))


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose among the items
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    name = config.getoption("--porthal-backend")
    if not name:
        return
    from porthal.conformance.cases import cases
    from porthal.conformance.runner import Bench
    from porthal.hal import PorthalError, contracts, create

    level = config.getoption("--porthal-level")
    try:
        bench = Bench(create(name))
    except PorthalError as error:
        raise pytest.UsageError(str(error)) from error
    for contract in contracts().values():
        for case in cases(contract, level):
            items.append(CaseItem.from_parent(session, name=case.token, case=case, bench=bench, level=level))


class CaseItem(pytest.Item):
    """One case: passes, fails with the reason and the command that repeats it, or is skipped where nobody claims it."""

    def __init__(self, *, case: Any, bench: Any, level: Any, **rest: Any) -> None:
        super().__init__(**rest)
        self.case, self.bench, self.level = case, bench, level

    def runtest(self) -> None:
        from porthal.conformance.report import replay_command
        from porthal.conformance.runner import check

        result = check(self.case, self.bench, self.level)
        if result.verdict == "UNCLAIMED":
            pytest.skip(result.message)
        if result.failed:
            pytest.fail(f"{result.explain()}\n{replay_command(result, str(self.bench.machine))}", pytrace=False)

    def reportinfo(self) -> tuple[Any, None, str]:
        return self.path, None, self.name
