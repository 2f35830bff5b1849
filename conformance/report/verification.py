"""What came of a report's rows when some of them, drawn at random, were run again."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from porthal.conformance.report.receipt import Reproduced, origin, seal
from porthal.hal import UsageError

if TYPE_CHECKING:
    from rich.console import Group

Drawn = TypeVar("Drawn")


class Checked(NamedTuple):
    """A row that was run again: what the report says of it, what came out here, and a command that shows it."""

    row: str
    said: str
    found: str
    holds: bool
    command: str


@dataclass(frozen=True)
class Verification:
    """The rows that were drawn of so many, where, and what is not the same here as where the report was made; `noisy` more were
    drawn, and said nothing."""

    checked: tuple[Checked, ...]
    of: int
    where: str
    device: str
    sources: Mapping[str, str]
    differences: tuple[str, ...]
    noisy: int = 0

    @property
    def reproduced(self) -> Reproduced:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        held = sum(row.holds for row in self.checked)
        return Reproduced(len(self.checked), held, self.noisy, now, self.device, dict(self.sources))

    @property
    def exit_code(self) -> int:
        """0 where every drawn row holds, 1 where one does not."""
        return int(not all(row.holds for row in self.checked))

    def marked(self, report: Mapping[str, Any]) -> str:
        """The report's JSON object with the mark of this, as text."""
        ours = report.get("porthal", report)
        made = asdict(self.reproduced)
        mark = {"reproduced": {**made, "seal": seal(report, made)}}
        return json.dumps({**report, "porthal": {**ours, **mark}} if ours is not report else {**report, **mark}, indent=1)

    def table(self) -> Group:
        """What differs here, each row that does not hold with the command that repeats it, and the outcome."""
        from rich.console import Group
        from rich.text import Text

        lines = [f"{self.where}: {len(self.checked) + self.noisy} of {self.of} rows, drawn at random", *self.differences]
        for row in self.checked:
            if not row.holds:
                lines += [f"does not hold: {row.row}", f"  said: {row.said}", f"  here: {row.found}", f"  {row.command}"]
        return Group(*map(Text, [*lines, origin(self.reproduced)]))


def drawn(rows: Sequence[Drawn], share: float) -> list[Drawn]:
    """That share of the rows, one at least, in their order; nobody knows before which. UsageError where there are none."""
    if not rows:
        raise UsageError("the report has no row that can be run again: nothing in it was tested")
    chosen = random.SystemRandom().sample(range(len(rows)), max(1, math.ceil(share * len(rows))))
    return [rows[n] for n in sorted(chosen)]


def elsewhere(said: Mapping[str, str], here: Mapping[str, str]) -> tuple[str, ...]:
    """One sentence per fact that is not the same."""
    names = [name for name in {**said, **here} if said.get(name) != here.get(name)]
    return tuple(f"different {name}: {said.get(name, 'not said')} there, {here.get(name, 'none')} here" for name in names)
