"""Signals that ask for the end: workers end too, and how to go on is said."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from porthal.cli import text


class Stopped(KeyboardInterrupt):
    """Another signal that asks for the end, which is answered as Ctrl-C is."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@contextmanager
def stoppable(advice: Callable[[], str] = lambda: "") -> Iterator[None]:
    """While work is done in other processes: SIGTERM and SIGHUP end those too; `advice` says how to go on."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    heard = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]  # not under nohup
    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        if said := advice():
            text.note(f"porthal: stopped: {said}")
        raise
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)
