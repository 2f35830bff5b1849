"""A conformance report put to the test: rows drawn at random are run again here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from porthal.conformance.cases.case import Case
from porthal.conformance.report.facts import Facts
from porthal.conformance.report.report import Report
from porthal.conformance.report.results import Result
from porthal.conformance.report.verification import Checked, Verification, drawn, elsewhere
from porthal.conformance.runner.ranked import everywhere
from porthal.conformance.runner.workers import Bounds, Pool
from porthal.hal import emulatable

UNTRIED = ("LEFT_OUT", "NOT_JUDGED")  # nothing was found that could come out again


def verify(
    report: Report,
    share: float,
    backend: str = "",
    bounds: Bounds | None = None,
    progress: Callable[[int, int, str], None] = lambda done, of, op: None,
) -> Verification:
    """Run that share of a report's cases again, on its own backend or another one, at its level.

    A row holds where the verdict and whose kernel it speaks of are the same, waived or not.
    Raises UsageError for a report without rows to run, and for tokens that this porthal does not read.
    """
    name = backend or report.backend
    rows = drawn([r for r in report.results if r.verdict not in UNTRIED], share)
    cases = {r.token: Case.from_token(r.token) for r in rows}
    emulated = report.place == "emulated device" and name.partition(":")[0] in emulatable()
    found: dict[str, Result] = {}
    with Pool(name, report.level, emulated, bounds or Bounds(), len(cases)) as pool:
        with everywhere(pool, bounds or Bounds()) as judged:
            for result in judged([*cases.values()]):
                found[result.token] = result
                progress(len(found), len(cases), result.op)
        facts = pool.facts
    checked = tuple(_checked(report, said, found[cases[said.token].token]) for said in rows)
    where, differences = f"{name} ({facts.place})", elsewhere(_facts(report), _facts(facts))
    return Verification(checked, len(report.results), where, facts.device, facts.sources, differences)


def _checked(report: Report, said: Result, found: Result) -> Checked:
    was, now = said.waived or said.verdict, found.verdict
    holds = (was, said.status) == (now, found.status)
    return Checked(said.token, _words(said, was), _words(found, now), holds, report.replay(said))


def _words(result: Result, verdict: str) -> str:
    message = f": {result.message}" if result.message else ""
    return f"{verdict} ({result.status}){message}"


def _facts(of: Report | Facts) -> Mapping[str, str]:
    """What may explain that a row comes out otherwise."""
    sources = {f"sources of {name}": digest for name, digest in of.sources.items()}
    return {"backend": of.backend, "place": of.place, "device": of.device, **sources, **of.environment}
