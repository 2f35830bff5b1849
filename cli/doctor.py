"""`porthal doctor`: the first day with a chip, ten commands, in one file to send back."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from porthal.cli import text
from porthal.cli.options import BackendOption, EmulatedFlag

PROGRAM = [sys.executable, "-c", "from porthal.cli import main; main()"]
PROMPT = "    def get(self, name):\n        if "
PASSED = r"^\d+ of \d+ cases passed \([1-9]\d* own"
ALL_PASSED = "every case passed that is not UNCLAIMED or LEFT_OUT, own among them"
KEPT = 120  # lines of a command's output, the last ones


@dataclass(frozen=True)
class Step:
    """A command, NAME in it stands for the backend; what it must print, in words, and as a pattern."""

    arguments: tuple[str, ...]
    words: str
    pattern: str = ""
    emulates: bool = True  # takes --emulated

    def command(self, name: str) -> list[str]:
        return [argument.replace("NAME", name) for argument in self.arguments]

    @property
    def shown(self) -> str:
        """As a shell takes it."""
        return "porthal " + " ".join("TEXT" if a == PROMPT else a for a in self.arguments)


def _op(name: str) -> Step:
    arguments = ("conform", "--backend", "NAME", "--op", name)
    return Step(arguments, ALL_PASSED, PASSED)


STEPS = (
    Step(("backends",), "NAME is available", r"^\*? *NAME +available", emulates=False),
    Step(("explain", "--backend", "NAME", "--dtype", "bfloat16"), "last: so many own, none missing", r": [1-9]\d* own"),
    _op("rms_norm"),
    _op("rope"),
    _op("moe_route"),
    _op("sparse_mla"),
    Step(("generate", "--backend", "NAME", "--max-new", "32", PROMPT), "the text that --backend reference prints"),
    Step(("diff", "--backend", "NAME", "--dtype", "bfloat16"), "No op exceeds its error budget", "^No op exceeds"),
    Step(("check", "--backend", "NAME"), "last: NAME computes what it should", r"^NAME\b.* computes what it should"),
    Step(("conform", "--backend", "NAME"), ALL_PASSED, PASSED),
)


@dataclass(frozen=True)
class Outcome:
    step: Step
    code: int | None  # None: it was stopped
    seconds: float
    output: str
    as_expected: bool

    @property
    def judged(self) -> str:
        return "as expected" if self.as_expected else "NOT AS EXPECTED"


def doctor(
    backend: BackendOption = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="default: porthal-doctor-NAME.txt, here")] = None,
    emulated: EmulatedFlag = False,
    timeout: Annotated[int, typer.Option(metavar="SECONDS", min=1, help="of each command")] = 1800,
) -> int:
    """Run the ten commands of the first day with a chip, and write what they print, with the versions and the device, into one
    file to send back, which grows with each. No secrets are in it, and no paths outside the package.

    Exit code 1 where a command prints something else than it must.
    """
    from porthal.cli.selecting import named

    name = named(backend, emulated).partition(":")[0]
    file = out or Path(f"porthal-doctor-{name}.txt")
    text.check_writable(out=file)
    machine = machine_facts(backend or name, emulated)
    done = []
    for number, step in enumerate(STEPS, 1):
        if not file.is_fifo():  # whose reader would take it for the end
            text.save(file, report(name, machine, done, step))
        outcome = run(step, backend or name, emulated, timeout)
        done.append(outcome)
        text.print(f"{number:2} {outcome.judged:15}  {step.shown.replace('NAME', name)}")
        text.stdout().flush()
    text.save(file, report(name, machine, done))
    good = all(outcome.as_expected for outcome in done)
    text.print(f"{sum(o.as_expected for o in done)} of {len(done)} as expected; send back {file.name}")
    return 0 if good else 1


def run(step: Step, backend: str, emulated: bool, timeout: int) -> Outcome:
    """One command in a process of its own, so that a crash or a hang costs it alone."""
    start = time.perf_counter()
    code, out, err = _process([*step.command(backend), *["--emulated"] * (emulated and step.emulates)], timeout)
    seconds = time.perf_counter() - start
    name = re.escape(backend.partition(":")[0])
    pattern = step.pattern.replace("NAME", name)
    if emulated and not step.emulates:  # the chip is not here, and is not looked for
        pattern = name
    good = code == 0 and bool(re.search(pattern, out, re.MULTILINE))
    if step.arguments[0] == "generate":
        good = good and out == _process([a.replace(backend, "reference") for a in step.command(backend)], timeout)[1]
    return Outcome(step, code, seconds, out + err, good)


def _process(arguments: list[str], timeout: int) -> tuple[int | None, str, str]:
    import subprocess

    try:
        done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, errors="replace", timeout=timeout)
        return done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        out, err = (p.decode(errors="replace") if isinstance(p, bytes) else p or "" for p in (late.stdout, late.stderr))
        return None, out, err


def machine_facts(backend: str, emulated: bool) -> dict[str, str]:
    """Versions, the variables that the backend's package names, and what the device says of itself."""
    import platform
    from datetime import datetime, timezone

    import porthal
    from porthal.hal import create
    from porthal.hal.discovery import surroundings

    modules, variables = surroundings(backend.partition(":")[0])
    device: dict[str, str]
    try:
        made = create(backend, emulated)
        device = {"place": made.place, "device": _asked(made.describe), **_all_asked(made.device_facts())}
    except Exception as error:  # somebody else's package, of any kind
        device = {"device": _sentence(error)}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "porthal": porthal.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **{f"module {module}": _version(module) for module in modules},
        **{f"variable {variable}": os.environ.get(variable, "not set") for variable in variables},
        **device,
    }


def _all_asked(facts: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    return {f"device {name}": _asked(ask) for name, ask in facts.items()}


def _asked(ask: Callable[[], object]) -> str:
    try:
        return str(ask())
    except Exception as error:  # what a runtime lacks is worth knowing
        return _sentence(error)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _version(module: str) -> str:
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    owners = packages_distributions().get(module, [module])
    with suppress(PackageNotFoundError):
        return ", ".join(f"{owner} {version(owner)}" for owner in dict.fromkeys(owners))
    return str(getattr(sys.modules.get(module), "__version__", "not installed as a package"))


def report(name: str, machine: Mapping[str, str], done: list[Outcome], begun: Step | None = None) -> str:
    """The file; `begun` is a command that has not ended."""
    lines = [f"porthal doctor, backend {name}", ""]
    lines += [f"{what}: {value}" for what, value in machine.items()]
    for number, outcome in enumerate(done, 1):
        ended = "stopped" if outcome.code is None else f"exit code {outcome.code}"
        lines += ["", f"--- {number}. {outcome.step.shown.replace('NAME', name)}"]
        words = outcome.step.words.replace("NAME", name)
        lines += [f"{outcome.judged}: {ended} after {outcome.seconds:.1f} s; it must print: {words}"]
        lines += outcome.output.splitlines()[-KEPT:]
    if begun:
        lines += ["", f"--- {len(done) + 1}. {begun.shown.replace('NAME', name)}", "it has begun, and not ended"]
    return private("\n".join(lines) + "\n")


def private(content: str) -> str:
    """Without what names a person or a machine: paths are told from the package on, others not at all."""
    import getpass
    import socket

    package = Path(__file__).resolve().parents[1]
    for folder in {str(package), str(package.parent / "porthal"), sys.modules["porthal"].__path__[0]}:
        content = content.replace(f"{folder}/", "porthal/")
    content = re.sub(r"""(["'])(?:~|/(?!dev/|proc/)|\\\\)[^"'\n]*[/\\][^"'\n]*\1""", r"\1<path>\1", content)  # with blanks, too
    content = re.sub(r"(?<![\w.<>-])(?!/(?:dev|proc)/)(?:~|/[\w.+@%-]+)/[\w.+@%/-]+|\\\\[\w.$-]+\\\S+", "<path>", content)
    host = socket.gethostname()
    for word in sorted({getpass.getuser(), host, host.partition(".")[0]} - {"", "root"}, key=len, reverse=True):
        content = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", "<name>", content, flags=re.IGNORECASE)
    return content
