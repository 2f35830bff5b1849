"""`pytest --porthal-backend=NAME [--porthal-level=LEVEL]`: one test per case, with the case's token as id.

The backend runs in its own process, so that a kernel that crashes it fails one test only.
`-m "discrepancy(number=17)"` chooses the cases of one entry of docs/discrepancies.md, `-m discrepancy` those of all.
Without the first option nothing is imported and nothing is collected.
"""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("porthal")
    group.addoption("--porthal-backend", metavar="NAME", help="test the conformance of this backend, case by case")
    group.addoption("--porthal-level", default="bring-up", metavar="LEVEL", help="bring-up, standard or strict")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "discrepancy(number): a case named in docs/discrepancies.md")


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose among the items
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    name = config.getoption("--porthal-backend")
    if not name:
        return
    from porthal.conformance.cases.plan import cases
    from porthal.conformance.level import level_of
    from porthal.conformance.runner.runs import asked
    from porthal.conformance.runner.workers import Bounds, Pool
    from porthal.hal import PorthalError, contracts

    try:
        level = level_of(config.getoption("--porthal-level")).name
        pool = Pool(name, level, emulated=False, bounds=Bounds(), cases=1)
    except PorthalError as error:
        raise pytest.UsageError(str(error)) from error
    config.add_cleanup(pool.close)
    plan = [case for contract in contracts().values() for case in cases(contract, level)]
    for case in (*plan, *asked(pool.facts, plan, list(contracts()), level)):
        items.append(CaseItem.from_parent(session, name=case.token, case=case, pool=pool))


class CaseItem(pytest.Item):
    """One case: passes, fails with reason and the command that repeats it, or is skipped if waived or not claimed."""

    def __init__(self, *, case: Any, pool: Any, **rest: Any) -> None:
        from porthal.conformance.cases.discrepancies import named_for

        super().__init__(**rest)
        self.case, self.pool = case, pool
        for known in named_for(case.token):
            self.add_marker(pytest.mark.discrepancy(number=known.number))

    def runtest(self) -> None:
        from porthal.conformance.report.results import replay_command
        from porthal.conformance.report.waivers import waive

        facts = self.pool.facts
        result = waive(self.pool.one(self.case), facts.waivers)
        if result.verdict in ("UNCLAIMED", "LEFT_OUT", "WAIVED"):
            pytest.skip(result.reason or result.message)
        if result.failed:
            again = replay_command(self.case.token, facts.backend, self.pool.setup.level, facts.place)
            pytest.fail(f"{result.explain()}\n{again}", pytrace=False)

    def reportinfo(self) -> tuple[Any, None, str]:
        return self.path, None, self.name
