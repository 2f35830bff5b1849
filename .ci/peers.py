"""Conformance of the peers: `python .ci/peers.py run` tests each in its environment, `python .ci/peers.py page` writes
docs/peers.md, and the speeds beside it, from what is in build/peers/results; `make peers` does both.

bench/peers/deviations.toml has the words: which failures are one deviation, and what it is. A failure without words is written
down as such. Exit code 1 where there is one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from porthal.bench.compare import Ratio, comparison
from porthal.bench.report import shortened
from porthal.bench.speeds import Speeds
from porthal.bench.text import time_text
from porthal.conformance.report.files import read
from porthal.conformance.report.report import Report
from porthal.conformance.report.results import Result

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "bench" / "peers"
RESULTS = ROOT / "build" / "peers" / "results"
FOUND, PAGE, SPEEDS = (ROOT / "docs" / f for f in ("results/peers.json", "peers.md", "results/peers-speed.md"))
OWN = """
from porthal.hal import contracts, create
chain = type(create({name!r})).__mro__
own = {{n for c in chain if c.__module__.partition(".")[0] != "porthal" for n in vars(c)}}
print(*[op for op in contracts() if op in own])
"""
ELSEWHERE = ("python", "system", "machine", "numpy")  # of what a report says of its environment
HEAD = """# Peers

What public libraries compute where they have a kernel for one of porthal's operators, judged like a chip's: the cases of the
standard level, in float64. `make peers` builds an environment for each library, runs this again and writes this page, from
`docs/results/peers.json` and the words in `bench/peers/deviations.toml`.

Tested on {device}, {date}.
In a cell stands how many of the cases passed that ran on the library's own kernel; what its signature or documentation rules
out was not asked ("no case": that is all of them). The thin packages in `bench/peers` that make the calls add no copies and no
checks beyond those, so what a library does with a strided array, or writes into a weight, is seen.

To see a row fail: `porthal replay TOKEN --backend NAME --level standard --peers bench/peers/peers.json`.
"""


# -- running ---------------------------------------------------------------------------------------------------------


def run(names: list[str]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names:
        python = PEERS / json.loads((PEERS / "peers.json").read_text())[name]
        own = subprocess.run([python, "-c", OWN.format(name=name)], check=True, capture_output=True, text=True).stdout.split()
        options = ["--backend", name, "--peers", str(PEERS / "peers.json"), "--level", "standard"]
        options += ["--json", str(RESULTS / f"{name}.json"), *(part for op in own for part in ("--op", op))]
        subprocess.run([sys.executable, "-c", "from porthal.cli import main; main()", "conform", *options], cwd=ROOT)


# -- what was found --------------------------------------------------------------------------------------------------


def deviations() -> list[dict[str, Any]]:
    return tomllib.loads((PEERS / "deviations.toml").read_text(encoding="utf-8"))["deviation"]


def found(names: list[str], texts: list[dict[str, Any]]) -> dict[str, Any]:
    """Per library: versions, and per op how many cases passed, how many are of which deviation, what nobody has words for."""
    made: dict[str, Any] = {}
    for name in names:
        report = read(RESULTS / f"{name}.json", Report.of_object)
        versions = {k: v for k, v in report.environment.items() if k not in ELSEWHERE}
        ops: dict[str, Any] = {}
        for row in report.rows:
            own = [r for r in report.results if r.op == row.op and r.status == "own" and r.verdict != "UNCLAIMED"]
            failed: dict[str, list[Result]] = {}
            unexplained = []
            for r in (r for r in own if r.failed):
                what = f"{r.token} {r.verdict}: {r.message}"
                fits = (t for t in texts if name in t["peers"] and row.op in t["ops"] and re.search(t["match"], what))
                text = next(fits, None)
                failed.setdefault(text["id"], []).append(r) if text else unexplained.append(what[:400])
            ops[row.op] = {
                "passed": sum(r.verdict == "PASS" for r in own),
                "failed": {k: {"cases": len(cases), "token": _shown(cases)} for k, cases in failed.items()},
                "unexplained": unexplained,
            }
        made[name] = {"versions": versions, "device": f"{report.device}{_model()}", "date": report.date[:10], "ops": ops}
    return made


def _model() -> str:
    """What tells processors apart whose name the machine hides."""
    told = dict(re.findall(r"^(cpu family|model)\s*: (\d+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    return f" (family {told['cpu family']}, model {told['model']})" if len(told) == 2 else ""


def _shown(cases: list[Result]) -> str:
    """The shortest token, of those that do not end other people's software."""
    return min((r.token for r in cases if r.verdict not in ("CRASH", "TIMEOUT")), key=len, default="")


def page(data: dict[str, Any], texts: list[dict[str, Any]]) -> str:
    ops = list(dict.fromkeys(op for peer in data.values() for op in peer["ops"]))
    devices, dates = (list(dict.fromkeys(peer[key] for peer in data.values())) for key in ("device", "date"))
    lines = [HEAD.format(device=", ".join(devices), date=", ".join(dates)), "## What holds", ""]
    lines += [f"| op | {' | '.join(data)} |", f"| --- |{' --- |' * len(data)}"]
    for op in ops:
        lines.append(f"| {op} | {' | '.join(_cell(peer['ops'].get(op)) for peer in data.values())} |")
    lines += ["", "An em dash: the library has no such kernel. Versions:", ""]
    for name, peer in data.items():
        versions = ", ".join(f"{k} {v}" for k, v in peer["versions"].items() if k != "porthal")
        lines.append(f"- {name}: {versions}")
    lines += ["", "## What does not", ""]
    for text in texts:
        hits = {(name, op): peer["ops"][op]["failed"][text["id"]] for name, peer in data.items() for op in peer["ops"]
                if text["id"] in peer["ops"][op]["failed"]}  # fmt: skip
        if hits:
            lines += [f"### {text['title']}", "", " ".join(text["text"].split()), ""]
            for (name, op), hit in hits.items():
                token = f", `{hit['token']}`" if hit["token"] else ""
                lines.append(f"- {name}, {op}: {hit['cases']} case{'s' * (hit['cases'] > 1)}{token}")
            lines.append("")
    if elsewhere := [text for text in texts if "seen" in text]:
        lines += ["## What this processor does not show", ""]
        for text in elsewhere:
            where = f"{', '.join(text['peers'])}; seen on {text['seen']}"
            lines.append(f"- {text['title']} ({where}): {' '.join(text['text'].split())}")
        lines.append("")
    unexplained = [what for peer in data.values() for op in peer["ops"].values() for what in op["unexplained"]]
    if unexplained:
        lines += ["## Without words yet", "", *(f"- `{what}`" for what in unexplained), ""]
    return "\n".join(lines)


def _cell(op: dict[str, Any] | None) -> str:
    if op is None:
        return "—"
    failed = sum(hit["cases"] for hit in op["failed"].values()) + len(op["unexplained"])
    return f"{op['passed']} of {op['passed'] + failed}" if op["passed"] + failed else "no case"


# -- speeds ----------------------------------------------------------------------------------------------------------


def speeds() -> str:
    """Each call once, cold and warm: the time of `cpu`, and how many times as long the others take."""
    files = [read(f, Speeds.of_object) for f in sorted(RESULTS.glob("bench-*.json"))]
    names = list(dict.fromkeys(n for file in files for n in file.by_backend if n != "cpu"))
    lines = [SPEED_HEAD, f"| call | caches | limit | cpu | of the limit | {' | '.join(names)} |"]
    lines.append(f"| --- | --- | --- | --- | --- |{' --- |' * len(names)}")
    untimed: dict[tuple[str, str], list[str]] = {}
    for file in files:
        sides = {side.backend: side.calls for side in comparison(file).sides}
        for call, mine in sides.get("cpu", {}).items():
            cells = []
            for name in names:
                other = sides.get(name, {}).get(call)
                if other is None or (other.kernel != "own" and name != "torch"):
                    cells.append("")
                elif mine.noisy or other.noisy:
                    cells.append("noisy")
                else:
                    cells.append(str(Ratio.of(mine.time, other.time)))
            what = shortened(call.token.partition(",")[2])
            share = "noisy" if mine.noisy else f"{mine.limit / mine.time.median:.0%}"
            lines.append(f"| {call.op} {what} | {call.cache} | {mine.bound} | {time_text(mine.time.median)} | {share} | "
                         + " | ".join(cells) + " |")  # fmt: skip
        for missing in file.missing:
            untimed.setdefault((missing.token, missing.why), []).append(missing.backend)
    told = [f"- not timed on {', '.join(names)}: `{token}`: {why}" for (token, why), names in untimed.items()]
    return "\n".join([*lines, "", *told, ""])


SPEED_HEAD = """# Speed beside the peers

`porthal bench --threads 1 --workload bench/peers/workloads/FILE --backend cpu,... --peers bench/peers/peers.json`, in bfloat16:
each backend in a process of its own, one thread, CPU time, samples in turns, weights packed beforehand on both sides, and every
call judged right before it was timed. A cell says how many times as fast `cpu` is as the peer, with the 95 % interval of this
run; below 1 the peer is faster. Empty: the library has no kernel for the call.
"""


def main(what: str, *chosen: str) -> int:
    names = list(chosen or json.loads((PEERS / "peers.json").read_text()))
    if what == "run":
        run(names)
        return 0
    texts = deviations()
    data = found([name for name in names if (RESULTS / f"{name}.json").exists()], texts)
    FOUND.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(data, texts), encoding="utf-8")
    if any(RESULTS.glob("bench-*.json")):
        SPEEDS.write_text(speeds(), encoding="utf-8")
    return int(any(op["unexplained"] for peer in data.values() for op in peer["ops"].values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
