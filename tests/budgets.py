"""What each folder of tests may cost, and what a run did cost: it is told at the end of a run and fails nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# CPU seconds of a folder run whole, children included, on two cores of an Intel Xeon (Emerald Rapids) with OMP_NUM_THREADS=1,
# while other runs used them too, planted C++ built anew: as measured in November 2026.
BUDGETS = {
    "house": 8, "quick": 4, "plain": 730, "native": 200, "examples": 145, "torch": 230, "emulated": 60, "browser": 12,
    "onnx": 26, "emulated_moore_threads": 18, "emulated_cambricon": 14, "emulated_kunlunxin": 9, "triton": 22, "processes": 65,
}  # fmt: skip
PROOF = {"proof": 660, "vendor": 30}  # `make proof` and `make vendor-ascend`, seldom


def spent() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


class Account:
    """A plugin: what each test file cost, how many of its tests passed, and whether it ran whole."""

    def __init__(self) -> None:
        self.seconds: Counter[Path] = Counter()
        self.collected: Counter[Path] = Counter()
        self.passed: Counter[Path] = Counter()
        self.left: Counter[Path] = Counter()  # tests of a file that have not run to their end
        self.chosen: set[Path] = set()  # files of which the command line names single tests

    def whole(self, file: Path) -> bool:
        return self.collected[file] > 0 == self.left[file] and file not in self.chosen

    def folders(self) -> Iterator[tuple[str, float]]:
        """The folders run whole, and their CPU seconds."""
        for folder in sorted({file.parent for file in self.collected if file.parent.parent == TESTS}):
            files = list(folder.glob("test_*.py"))
            if all(map(self.whole, files)):
                yield folder.name, sum(self.seconds[file] for file in files)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        before = spent()
        made = yield
        if isinstance(collector, pytest.Module):
            self.seconds[collector.path] += spent() - before
        return made

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
        for item in items:
            self.collected[item.path] += 1
            self.left[item.path] += 1
        named = [arg.partition("::") for arg in config.args]
        self.chosen = {(config.invocation_params.dir / file).resolve() for file, colons, _ in named if colons}
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = spent()
        made = yield
        self.seconds[item.path] += spent() - before
        self.left[item.path] -= 1
        return made

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        if report.when == "call":
            self.passed[item.path] += report.passed
        elif report.failed:  # a test with an error around it counts no more
            self.passed[item.path] -= 1
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for folder, seconds in self.folders():
            most = (BUDGETS | PROOF).get(folder)
            terminalreporter.write_line(f"tests/{folder}: {seconds:.0f} of {most} CPU seconds")
