"""Programs that run as several processes, one per rank."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from porthal.hal import bind, create
from porthal.model.layout import Layout
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


def forked(size: int, run: Callable[[], Any]) -> list[Any]:
    """What `run` returns in so many ranks, which are forks of this process and know what it has imported."""
    port, pipes = next(_ports), [os.pipe() for _ in range(size)]
    ranks = [_forked(environment(rank, size, port), run, *pipe) for rank, pipe in enumerate(pipes)]
    found = []
    for rank, (reads, writes) in zip(ranks, pipes):
        os.close(writes)
        with open(reads, "rb") as said:
            found.append(said.read())
        os.waitpid(rank, 0)
    return [pickle.loads(each) if each else None for each in found]


def _forked(variables: Mapping[str, str], run: Callable[[], Any], reads: int, writes: int) -> int:
    if child := os.fork():
        return child
    try:
        os.environ.update(variables)
        os.write(writes, pickle.dumps(run()))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def assert_the_text_of_two_ranks_is_the_reference_s(chip: str) -> None:
    """A text of an emulated chip in float32, whose experts lie on two processes."""

    def text() -> list[int]:
        backend = create(chip)
        with backend.communicator() as comm:
            return load(binding=bind(backend=backend), layout=Layout(comm)).generate(list(b"import os\n"), 4)

    expected = load(binding=bind(backend=create("reference"))).generate(list(b"import os\n"), 4)
    assert forked(2, text) == [expected] * 2
