"""By somebody else's eye: defects planted by authors who had seen no case, and how many of them the cases of a level find.

They stand in outside/open.json and outside/held.json: edits of kernels after public bugs and vendors' limits, none of them
written for a case. Cases may be added for what escapes of the open ones. The held ones are kept out of that, so that their
score is of mistakes nobody looked at: it is told by family alone, and no case may be made for one of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.level import BRING_UP, LEVELS, STANDARD
from porthal.conformance.selftest import compiled
from porthal.conformance.selftest.planting import plant
from porthal.conformance.selftest.run import Progress, check_ops, first_failing, plan, spread

if TYPE_CHECKING:
    from rich.console import Group

PARTS = "open", "held"


@dataclass(frozen=True)
class Defect:
    """A mistake in one op: edits of a source, as in `planting`.

    part    of PARTS
    kind    its family and what it is, "size: 8-bit counter"
    dtypes  in which its author has seen it change results
    story   how a chip comes to it, and where it was seen
    """

    part: str
    op: str
    name: str
    kind: str
    source: str
    edits: tuple[tuple[str, str], ...]
    dtypes: tuple[str, ...]
    story: str

    @property
    def key(self) -> str:
        return f"{self.op}/{self.name}"

    @property
    def family(self) -> str:
        return self.kind.partition(":")[0]

    @property
    def native(self) -> bool:
        return self.source in compiled.SOURCES


@cache
def outside() -> dict[str, Defect]:
    """All of them by key."""
    found = {}
    for part in PARTS:
        text = Path(__file__).with_suffix("").joinpath(f"{part}.json").read_text(encoding="utf-8")
        for entry in json.loads(text):
            edits = tuple((old, new) for old, new in entry.pop("edits"))
            defect = Defect(part, edits=edits, dtypes=tuple(entry.pop("dtypes")), **entry)
            found[defect.key] = defect
    return found


@dataclass(frozen=True)
class Tried:
    """A defect at a level: the token and the verdict of the case that failed first, "" where none did."""

    level: str
    op: str
    name: str
    token: str
    verdict: str
    cases: int
    seconds: float  # of the processor

    @property
    def defect(self) -> Defect:
        return outside()[f"{self.op}/{self.name}"]


def attempt(task: tuple[str, str]) -> Tried:
    """Run the cases of a level on one defect in this process, up to the first that fails."""
    level, key = task
    defect, started = outside()[key], time.process_time()
    chosen = plan(defect.op, source=defect.source, level=level)
    result, cases = first_failing(chosen, Bindings(plant(key, defect.source, *defect.edits)), level, source=defect.source)
    found = (result.token, result.verdict) if result else ("", "")
    return Tried(level, defect.op, defect.name, *found, cases, time.process_time() - started)


# -- the whole ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """How many of a family are caught at a level."""

    level: str
    part: str
    family: str
    caught: int
    planted: int


@dataclass(frozen=True)
class Score:
    """Both parts by level and family; each trial of the open ones. `seconds` are the processor's."""

    rows: tuple[Row, ...]
    trials: tuple[Tried, ...]
    seconds: float
    unplanted: str = ""

    @classmethod
    def of(cls, trials: Sequence[Tried], unplanted: str) -> Score:
        found: dict[tuple[str, str, str], list[bool]] = {}
        for t in trials:
            found.setdefault((t.level, t.defect.part, t.defect.family), []).append(bool(t.token))
        rows = tuple(Row(*key, sum(caught), len(caught)) for key, caught in sorted(found.items()))
        mine = tuple(t for t in trials if t.defect.part == "open")
        return cls(rows, mine, sum(t.seconds for t in trials), unplanted)

    @property
    def escaped(self) -> list[Tried]:
        """Of the open ones, at each level."""
        return [t for t in self.trials if not t.token]

    @property
    def exit_code(self) -> int:
        return int(any(row.caught < row.planted for row in self.rows))

    @property
    def summary(self) -> str:
        totals = {(level, part): self._count(level, part) for level, part in product(self.levels, PARTS)}
        found = [f"level {level}, {part}: {caught} of {of} caught" for (level, part), (caught, of) in totals.items() if of]
        return "; ".join((*found, f"{self.seconds:.0f} s of a processor", *filter(None, [self.unplanted])))

    @property
    def levels(self) -> list[str]:
        return [level for level in LEVELS if any(row.level == level for row in self.rows)]

    def _count(self, level: str, part: str, family: str = "") -> tuple[int, int]:
        mine = [r for r in self.rows if (r.level, r.part) == (level, part) and family in ("", r.family)]
        return sum(r.caught for r in mine), sum(r.planted for r in mine)

    def lines(self) -> Iterator[list[str]]:
        """A table: its head, a line for each family, and one for all."""
        columns = list(product(self.levels, PARTS))
        yield ["family", *(f"{level}, {part}" for level, part in columns)]
        for family in (*sorted({row.family for row in self.rows}), ""):
            counts = (self._count(*column, family) for column in columns)
            yield [family or "all", *(f"{caught}/{planted}" if planted else "" for caught, planted in counts)]

    def table(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        head, *lines = self.lines()
        for n, name in enumerate(head):
            table.add_column(name, justify="right" if n else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        said = [Text(f"ESCAPED {t.level}: {t.defect.key} after {t.cases} cases ({t.defect.kind})") for t in self.escaped]
        return Group(Text("defects by authors who had seen no case"), table, *said, Text(self.summary))

    @classmethod
    def from_json(cls, text: str) -> Score:
        """The score that `json` wrote."""
        data = json.loads(text)
        rows, trials = tuple(Row(**r) for r in data["rows"]), tuple(Tried(**t) for t in data["trials"])
        return cls(rows, trials, data["seconds"], data["unplanted"])

    def json(self) -> str:
        return json.dumps(asdict(self) | {"summary": self.summary, "exit_code": self.exit_code}, indent=1)


def self_test(
    ops: Sequence[str] = (),
    quick: bool = False,
    progress: Progress | None = None,
    workers: int = 0,
) -> Score:
    """Both levels, or where it is to be `quick` bring-up alone, in as many processes as there are processors."""
    check_ops(ops)
    chosen = [d for d in outside().values() if not ops or d.op in ops]
    plantable = [d for d in chosen if not (d.native and compiled.lacking())]
    levels = (BRING_UP.name,) if quick else (STANDARD.name, BRING_UP.name)  # what takes longest first
    trials = spread(attempt, [(level, d.key) for level in levels for d in plantable], progress, workers)
    left = len(chosen) - len(plantable)
    return Score.of(trials, f"{left} defects in C++ were not planted: {compiled.lacking()}" if left else "")
