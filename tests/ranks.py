"""Programs that run as several processes, one per rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from porthal.hal import bind, create
from porthal.model.load import load

ROOT = Path(__file__).resolve().parents[1]
_ports = count(20000 + os.getpid() % 20000)  # only a part of the name under which ranks of one machine meet


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher sets for a rank."""
    found = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return {name: str(value) for name, value in found.items()}


@contextmanager
def started(
    size: int, arguments: Sequence[str], changed: Mapping[int, Mapping[str, str | None]] | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """`python ARGUMENTS` as so many ranks; `changed` says which variables are others in a rank, None where one is missing."""
    port, ranks = next(_ports), []
    try:
        for rank in range(size):
            variables = {**os.environ, **environment(rank, size, port), **(changed or {}).get(rank, {})}
            given = {name: value for name, value in variables.items() if value is not None}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            ranks.append(subprocess.Popen([sys.executable, *arguments], env=given, cwd=ROOT, text=True, **pipes))
        yield ranks
    finally:
        for each in ranks:
            each.kill()
            each.communicate()


def ran(
    size: int, arguments: Sequence[str], changed: Mapping[int, Mapping[str, str | None]] | None = None, timeout: float = 60
) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each rank."""
    with started(size, arguments, changed) as ranks:
        said = [each.communicate(timeout=timeout) for each in ranks]
        return [(each.returncode, *texts) for each, texts in zip(ranks, said)]


def assert_the_text_of_two_ranks_is_the_reference_s(backend: str) -> None:
    """A text of an emulated chip in float32, whose experts lie on two processes."""
    text = "import os\n"
    found = ran(2, ["-m", "porthal", "generate", text, "--max-new", "4", "--backend", backend, "--emulated"], timeout=300)
    alone = load(binding=bind(backend=create("reference"))).generate(list(text.encode()), 4)
    assert [(code, out) for code, out, _ in found] == [(0, text + bytes(alone).decode()), (0, "")], found
