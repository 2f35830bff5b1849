"""What each level means: one row for everything that depends on it and on nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from porthal.hal.errors import UsageError

SUITE = 3  # the version of the plan of cases and of the rules of judgement


@dataclass(frozen=True)
class Level:
    """Which calls are planned, how often each is run, and how strictly it is judged.

    production_rows      row counts at GLM-5's own dims, beside 2
    production_batches   and batch compositions there
    elements             logical elements of all operands and results of one case, at most
    named_elements       and of a case that is named for a known discrepancy
    regimes              requests of the steps at a model's own sizes, see `cases.profiles`
    turns                of these an op that sees no contexts meets one of so many in each of its shapes
    seconds, copied      what one such call may take, and how many elements it may hold
    pooled               cases that are made for pairs of classes, see `cases.pairs`; of these as many are planned
    pairs                as take so many seconds for each thing that a call of the op chooses
    pair                 and each of them at most
    thorough             every variation is tested in every dtype, also with values that a contract does not list
    seeds                further seeds of a call of 65 rows
    runs                 of a kernel on the same inputs
    pointwise            the permitted error in budgets
    whole, row           the permitted ratio to an ideal chip's error, over all and in the worst row
    """

    name: str
    production_rows: tuple[int, ...]
    production_batches: tuple[str, ...]
    elements: int
    named_elements: int
    regimes: tuple[str, ...]
    turns: int
    seconds: float
    copied: int
    pooled: int
    pairs: float
    pair: float
    thorough: bool
    seeds: tuple[int, ...]
    runs: int
    pointwise: float
    whole: float
    row: float


BRING_UP = Level(
    "bring-up",
    production_rows=(1,),
    production_batches=("decode",),
    elements=2**22,
    named_elements=2**17,
    regimes=("260*1/300+3*4/600+40/500", "3*1/70000+1*4/33000"),
    turns=3,
    seconds=0.06,
    copied=2**25,
    pooled=60,
    pairs=0.031,
    pair=0.05,
    thorough=False,
    seeds=(),
    runs=2,
    pointwise=4,
    whole=4,
    row=8,
)
STANDARD = Level(
    "standard",
    production_rows=(1, 17, 65),
    production_batches=("decode", "mixed", "chunked"),
    elements=2**25,
    named_elements=2**23,
    regimes=(
        "1/1048576",
        "8*1/131072",
        "64*1/32768",
        "256*1/8192",
        "64*4/8192",
        "512/8192",
        "250*1/1024+5*4/40000+2*1/0+300/131072",
    ),
    turns=3,
    seconds=1.2,
    copied=2**27,
    pooled=450,
    pairs=0.4,
    pair=0.6,
    thorough=True,
    seeds=(),
    runs=3,
    pointwise=2,
    whole=2,
    row=4,
)
STRICT = Level(
    "strict",
    production_rows=(1, 17, 65, 257),
    production_batches=("decode", "mixed", "chunked", "padded", "idle"),
    elements=2**26,
    named_elements=2**27,
    regimes=(
        *(f"{n}*1/{kv}" for n in (1, 8, 64, 256) for kv in (1024, 8192, 32768, 131072, 1048576)),
        *(f"{n}*4/{kv}" for n in (1, 8, 64, 256) for kv in (1024, 8192, 32768, 131072)),
        *(f"{q}/{kv}" for q in (512, 4096) for kv in (8192, 32768, 131072, 1048576)),
        "250*1/1024+5*4/40000+2*1/0+300/131072",
    ),
    turns=1,
    seconds=20.0,
    copied=2**29,
    pooled=800,
    pairs=8.0,
    pair=5.0,
    thorough=True,
    seeds=(1, 2, 3),
    runs=50,
    pointwise=1,
    whole=1.25,
    row=2,
)
LEVELS: Mapping[str, Level] = {level.name: level for level in (BRING_UP, STANDARD, STRICT)}


def level_of(name: str) -> Level:
    """The level of this name; UsageError for any other."""
    if name not in LEVELS:
        raise UsageError(f"unknown level {name!r}: expected one of {', '.join(LEVELS)}")
    return LEVELS[name]
