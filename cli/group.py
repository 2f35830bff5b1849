"""What every command shares: quick help, a stdout of its own, exit codes."""

from __future__ import annotations

import signal
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from porthal.cli import text
from porthal.hal import PorthalError


class Quick:
    """Gives --help the default False: for None, typer imports pydantic, which takes longer than all the rest."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        option.default = False
        return option


class Command(Quick, TyperCommand):
    """What runs once the arguments are read, maybe with other people's code: stdout stays ours."""

    def invoke(self, ctx: Any) -> Any:
        with text.alone():
            return super().invoke(ctx)


class Commands(Quick, TyperGroup):
    """Exit codes: what a command returns, 2 for a PorthalError (its sentence on stderr), for a signal 128 and its number."""

    def invoke(self, ctx: Any) -> Any:
        try:
            code = super().invoke(ctx)
        except PorthalError as error:
            text.note(f"porthal: {error}")
            code = 2
        except KeyboardInterrupt as stop:
            code = 128 + getattr(stop, "signal", signal.SIGINT)
        raise typer.Exit(code or 0)


class App(typer.Typer):
    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, cls=Command, **settings)
