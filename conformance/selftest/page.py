"""The pages of documentation that the suite writes about itself: docs/self-test.md and docs/discrepancies.md."""

from __future__ import annotations

import sys
from pathlib import Path

from porthal.conformance.cases.discrepancies import DISCREPANCIES
from porthal.conformance.level import STANDARD
from porthal.conformance.selftest import outside
from porthal.conformance.selftest.discrepancies import DEFECTS
from porthal.conformance.selftest.generators import GENERATORS, lacking
from porthal.conformance.selftest.planting import SCORED, defects
from porthal.conformance.selftest.run import SEEDS, Score, share
from porthal.hal import contracts

SELF_TEST_HEAD = """# The suite's own test

How many mistakes the cases of the standard level find when they are planted in right kernels, and how many right kernels they
accuse. This page is made by `python -m porthal.conformance.selftest.page F G`, F that of `porthal self-test --json F`.

{summary}.

A defect is an edit of a kernel's source in Python or C++: one snippet that stands for another. It has to be found in float32
and in bfloat16 by the cases of its op alone. An honest variant is such an edit, too, but one that the contract permits: another
order of summation, another rounding, another structure, another instruction set. It must pass at every one of {seeds} seeds.

| op | caught in float32 | in bfloat16 | where dtypes are fixed | honest runs passed | of so many cases |
|---|---|---|---|---|---|"""
OUTSIDE = """
## By somebody else's eye

Seven authors who had seen no case planted {planted} more defects, after public bug reports, limits that vendors state, and the
ways such kernels are built: tiles, launch grids, narrow counters, workspaces, plans that are kept. Each changes what a call of
its author's own returns. It counts as caught when one case of its op fails. `porthal self-test --outside --json G` runs them
at both levels. Caught of planted:
"""
MEANING = """
Cases were added for what had escaped of the open ones: their score says how well that went. The held ones, about a quarter,
were kept out of it and are told by family alone: their score is what to expect of a mistake that nobody looked at. Five of
the authors came later, and theirs are open now. When no case had been made for them, of 122 of the first two 93 were caught at
bring-up and 106 at standard; of 72 of the next two, who were asked for what the others may have missed, 48 and 61; of 58 of
the last 50 and 55.
None of it is a probability: how often chips have a mistake of a family is not known. They are edits of this project's
kernels, mostly in Python, that imitate faults of others; of compilers, drivers and memory that fail they say nothing.

At the standard level {held} held ones escape, and these open ones:

| defect | kind | why no case fails |
|---|---|---|"""
ESCAPES = {
    "attributes": "no case has such an attribute",
    "batch": "no batch of a case is composed so",
    "capture": "no captured call is replayed so",
    "chunk loops": "no case goes through such a loop often enough",
    "determinism": "no case compares calls that differ so",
    "dtype": "no case has these dtypes together",
    "numerics": "no case has the size at which the error exceeds what the contract permits",
    "off-by-one": "no case ends there",
    "optional operands": "no case leaves them out after a call that had them",
    "plumbing": "no case lays its operands out so in a call of such a size, or changes a plan so",
    "rounding": "the error stays below what the contract permits",
    "routing": "no case routes rows so",
    "schemes": "no case under a scheme has such sizes, or codes",
    "size": "no case is as large there, or is so where it would show",
    "state": "no case has the values or the earlier calls at which it acts",
    "tail": "no case has such a tail behind such an address",
    "values": "no case has such values, or the contract permits what is made of them",
}
DISCREPANCIES_HEAD = """# Discrepancies

What went wrong when others brought mixture-of-experts and sparse-attention models to a chip, and what finds it here. This
page is made by `python -m porthal.conformance.selftest.page discrepancies`.

A case is a token for `porthal replay`; what triggers it is also in the cases that the patterns in italics describe. The
defect is the same mistake planted in a right kernel: the cases of its row find it, as
`python -m porthal.conformance.selftest.discrepancies` verifies, which says how many others of the op do, too. One row against
a chip: `pytest --porthal-backend=NAME --porthal-level=standard -m "discrepancy(number=17)"`.
"""

TAIL = """Most of these would have been found by a few variations of any call. The standard level makes them on every op; beside
them stand NaN in all memory that nothing may read, guard bands around all that a backend allocates, and one mistake of each
kind that a checked call must refuse.
"""


def self_test(score: Score, others: outside.Score) -> str:
    """docs/self-test.md."""
    known = {d.key: d for d in defects()}
    lines = [SELF_TEST_HEAD.format(summary=score.summary, seeds=SEEDS)]
    for op in contracts():
        mine, honest = [t for t in score.caught if t.op == op], [t for t in score.passed if t.op == op]
        found = (share([bool(t.token) for t in mine if t.dtype == d]) for d in ("float32", "bfloat16", ""))
        passed = share([not t.token for t in honest])
        lines.append(f"| {op} | {' | '.join(found)} | {passed} | {sum(t.cases for t in honest)} |")
    lines += ["", "## By class", "", "| mistake | caught |", "|---|---|"]
    kinds: dict[str, list[bool]] = {}
    for t in score.caught:
        kinds.setdefault(known[f"{t.op}/{t.name}"].kind, []).append(bool(t.token))
    lines += [f"| {kind} | {share(kinds[kind])} |" for kind in sorted(kinds)]
    lines += by_others(others)
    lines += ["", "## Not scored", "", "| defect | why |", "|---|---|"]
    lines += [f"| {d.key} | equivalent: {d.equivalent} |" for d in known.values() if d.equivalent]
    lines += [f"| {d.key}, {' and '.join(set(SCORED) - set(d.dtypes))} | {d.why} |" for d in known.values() if d.why]
    return "\n".join(lines) + "\n"


def by_others(score: outside.Score) -> list[str]:
    """The section on defects by authors who had seen no case; of the held ones counts alone."""
    planted = sum(row.planted for row in score.rows if row.level == STANDARD.name)
    head, *lines = ([f" {cell} " for cell in line] for line in score.lines())
    table = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    missed = sum(r.planted - r.caught for r in score.rows if (r.level, r.part) == (STANDARD.name, "held"))
    return [
        OUTSIDE.format(planted=planted),
        *(f"|{'|'.join(line)}|" for line in table),
        MEANING.format(held=missed),
        *(
            f"| {t.defect.key} | {t.defect.kind} | {ESCAPES[t.defect.family]} |"
            for t in score.escaped
            if t.level == STANDARD.name
        ),
    ]


def discrepancies() -> str:
    """docs/discrepancies.md."""
    planted = {d.discrepancy: d.key for d in DEFECTS}
    count = {s: sum(d.status == s for d in DISCREPANCIES) for s in ("covered", "suite", "open")}
    lines = [
        DISCREPANCIES_HEAD,
        f"Of {len(DISCREPANCIES)}, {count['covered']} are covered by cases and {count['suite']} by tests of the suite itself; "
        f"{count['open']} are not covered yet.",
        "",
        "| # | What went wrong | Seen in | Found by | Defect |",
        "|---|---|---|---|---|",
    ]
    for d in DISCREPANCIES:
        found = "<br>".join([*(f"`{t}`" for t in d.cases), *(f"*{p.replace('*', chr(92) + '*')}*" for p in d.family)])
        if d.status == "suite":
            found = f"`{d.by}`"
        elif d.status == "open":
            found = f"not covered yet: needs {d.by}"
        defect = f"`{planted[d.number]}`" if d.status == "covered" else ""
        lines.append(f"| {d.number} | {d.what} | {', '.join(map(_linked, d.sources.split(', ')))} | {found} | {defect} |")
    return "\n".join([*lines, *_variations()]) + "\n"


def _variations() -> list[str]:
    """What is varied on every op, and where it is not."""
    missing = {op: lacking(op) for op in contracts()}
    lines = ["", "## On every op", "", TAIL, "| Variation | What it is | Not on |", "|---|---|---|"]
    for name, generator in GENERATORS.items():
        without = ", ".join(f"`{op}` ({found[name]})" for op, found in missing.items() if name in found)
        lines.append(f"| {name} | {generator.__doc__} | {without} |")
    return lines


def _linked(source: str) -> str:
    name, _, note = source.partition(" ")
    repository, _, number = name.partition("#")
    return f"[{name}](https://github.com/{repository}/issues/{number})" + f" {note}" * bool(note)


if __name__ == "__main__":
    if sys.argv[1:] == ["discrepancies"]:
        made = discrepancies()
    else:
        mine, others = (Path(file).read_text("utf-8") for file in sys.argv[1:])
        made = self_test(Score.from_json(mine), outside.Score.from_json(others))
    print(made, end="")
