"""The demo checkpoint's calls under pytest-benchmark, in this process: `pytest --benchmark-only bench`.

The backend is the selected one, as PORTHAL_BACKEND names it. Caches are warm. `porthal bench` puts backends side by side.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from porthal.bench.call import Call
from porthal.bench.report import shortened
from porthal.bench.scale import Bounds
from porthal.bench.workloads import Row, workload
from porthal.conformance.execution.bindings import Bindings
from porthal.hal import create, selected

ROWS = {row.case.token: row for row in workload("demo", ["decode"], "", Bounds()).rows}


@pytest.fixture(scope="module")
def bindings() -> Bindings:
    return Bindings(create(selected()[0]))


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: shortened(row.case.token))
def test_call(row: Row, bindings: Bindings, benchmark: BenchmarkFixture) -> None:
    call = Call(row.case, bindings)
    assert call.judged.verdict == "PASS", call.judged.message
    benchmark.group = row.group
    benchmark.extra_info |= {"token": row.case.token, "backend": str(bindings.backend), "calls": row.calls}
    benchmark(call.run)
