"""What `porthal plan --device here` predicts, beside the steps that ranks of this machine make.

`python -m porthal.bench.planned` prints the table of docs/results/plan.md, and what the clock said, in two minutes where
nothing else runs. It starts up to 8 ranks, however few processors there are.
"""

from __future__ import annotations

import os
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from porthal.bench.plan import HERE, Asked, Device, plans
from porthal.bench.ranked import Group, of_sizes
from porthal.bench.workloads import half_config
from porthal.conformance.cases.case import Case
from porthal.hal import UsageError

LAYOUTS = ((1, "ep", 1), (1, "ep", 8), (2, "tp+ep", 1), (2, "tp+ep", 8), (2, "dp+ep", 8), (4, "tp+ep", 4), (4, "dp+ep", 16),
           (8, "dp+ep", 16))  # fmt: skip
CONTEXT, DTYPE = 1024, "bfloat16"
STEPS, CALLS = 12, 500
FEW: dict[str, Any] = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank"), 64)
HEAD = ("ranks", "layout", "requests", "predicted", "median", "least", "processor", "off by, of the median", "of the processor")


@dataclass(frozen=True)
class Beside:
    """What a processor takes beside the work: seconds of a call, of an exchange of experts' rows, and of a sum."""

    call: float
    exchange: float
    sum: float


def beside() -> Beside:
    """Of one rank's calls of a model with hardly any numbers, and of two ranks' exchanges of hardly any."""
    with closing(Group("cpu", 1)) as one:
        [calls] = one.ask("model", replace(half_config(), **FEW), "ep", DTYPE, [(1, 2)])
        call = min(seconds for _, seconds in one.ask("steps", STEPS)[0]) / calls
    sizes = {"H": 64, "k": 8, "E": 32, "N": 1, "T": 1, "M": 16, "ranks": 2}
    with closing(Group("cpu", 2)) as two:
        found = {op: _least(two, of_sizes(op, sizes)) for op in ("ep_dispatch", "ep_combine", "all_reduce")}
    return Beside(call, (found["ep_dispatch"] + found["ep_combine"]) / 2, found["all_reduce"])


def _least(group: Group, case: Case) -> float:
    """Seconds of a processor that a call takes, on the rank that it takes more of."""
    group.ask("open", case)
    return max(min(seconds for _, seconds in each) for each in group.ask("steps", CALLS))


def row(took: Beside, ranks: int, kind: str, requests: int) -> list[str]:
    """A layout, predicted and as it is."""
    tensor, turns = ranks if kind == "tp+ep" else 1, max(1.0, ranks / len(os.sched_getaffinity(0)))
    device = Device.named(HERE, ranks)
    device = replace(device, call=turns * took.call, latency=turns * took.exchange, sums=turns * took.sum)
    found = plans(half_config(), device, Asked(ranks, CONTEXT, requests, DTYPE))
    plan = next(each for each in found if (each.tp, each.ep) == (tensor, ranks))
    with closing(Group("cpu", ranks)) as group:
        for answers in (group.ask("model", half_config(), kind, DTYPE, [(1, CONTEXT)] * requests), group.ask("steps", STEPS)):
            if wrong := next((each for each in answers if not isinstance(each, (int, list))), None):
                raise UsageError(f"{ranks} ranks, {kind}: {wrong.message}")
    clocks = [max(each[n][0] for each in answers) for n in range(STEPS)]
    own = max(min(seconds for _, seconds in each) for each in answers)
    predicted, times = plan.seconds, (median(clocks), min(clocks), own)
    off = (predicted / times[0] - 1, predicted / turns / times[2] - 1)
    return [str(ranks), kind, str(requests), *(f"{1e3 * each:.1f} ms" for each in (predicted, *times)),
            *(f"{each:+.0%}" for each in off)]  # fmt: skip


def main() -> None:
    if words := sys.argv[1:]:
        sys.exit(f"python -m porthal.bench.planned takes no arguments, and was given {' '.join(words)}")
    found = beside()
    print(f"a call takes {found.call * 1e6:.0f} µs beside its work, an exchange {found.exchange * 1e6:.0f} µs, "
          f"a sum {found.sum * 1e6:.0f} µs")  # fmt: skip
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    for each in LAYOUTS:
        print(f"| {' | '.join(row(found, *each))} |", flush=True)


if __name__ == "__main__":
    main()
