"""The command line: argument parsing and printing only."""

if not __name__.startswith("porthal."):
    raise ImportError(f"import porthal.{__name__} instead of {__name__}: two names make two registries.")


def main() -> None:
    """The `porthal` command."""
    from porthal.cli.app import app
    from porthal.cli.text import finish, keep_stdout

    keep_stdout()
    try:
        app(prog_name="porthal")
    except SystemExit as left:
        raise SystemExit(finish(left.code)) from None
