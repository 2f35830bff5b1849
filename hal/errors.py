"""The errors porthal raises on purpose. The text of each is one sentence: what was wrong, its value, what was expected.

And the way in which it says what is worth knowing and stops nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

LINES = 3  # of a foreign message, whose first often says only that something failed


class PorthalError(Exception):
    """Base of every error that porthal raises on purpose."""


class UsageError(PorthalError, ValueError):
    """A wrong argument, name, shape, dtype or file content."""


class NotClaimed(PorthalError, NotImplementedError):
    """No kernel of the chosen backends claims this call, and the policy allows no fallback."""


class DataNotTaken(NotClaimed):
    """The kernel takes calls like this one, but not with these values; raised before it runs, so that another can."""


class NotFinite(PorthalError, ArithmeticError):
    """What a model computed is NaN or infinite. `done` is what it had made before that: of texts, a `Generated`."""

    def __init__(self, sentence: str, done: Any = None) -> None:
        super().__init__(sentence)
        self.done = done


class PeerLost(PorthalError, RuntimeError):
    """Another rank of a group is gone, or did not answer in time; the group is lost."""


class NoReader(BrokenPipeError):
    """Nobody reads what porthal writes any more."""


class Unavailable(PorthalError, ImportError):
    """A backend that is not here, or is here and broken."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the host or a device had no memory left: libraries have types of their own for that, or only words."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def message_of(error: BaseException) -> str:
    """An exception in one line: its type and the first lines of what it says."""
    try:
        said = str(error).encode("utf-8", "replace").decode("utf-8")
    except Exception as unreadable:  # its own __str__ is foreign code too
        said = f"its message raises {type(unreadable).__name__}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"{type(error).__name__}: {'; '.join(lines[:LINES]) or 'no message'}"


@contextmanager
def foreign(what: str, kind: type[PorthalError] = Unavailable) -> Iterator[None]:
    """Around code that is not ours: all that it raises, SystemExit too, becomes one sentence that begins with `what`.

    porthal's own errors pass as they are, and so does KeyboardInterrupt in the main thread: there it may be the user's.
    """
    try:
        yield
    except (PorthalError, NoReader):
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and current_thread() is main_thread():
            raise
        advice = "; take a smaller model, batch or context, or several devices" if out_of_memory(error) else ""
        raise kind(f"{what}: {message_of(error)}{_raised_at(error)}{advice}") from error


def _raised_at(error: BaseException) -> str:
    """The file and line that raised it, below the caller of `foreign`; "" for what C raises there."""
    from traceback import extract_tb

    frames = [frame for frame in extract_tb(error.__traceback__)[2:] if "importlib" not in frame.filename]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


@cache
def note(line: str) -> None:
    """One line on stderr, once in a process, unless the program has given the logger "porthal" a handler of its own."""
    import logging

    logging.getLogger("porthal").warning(line)
