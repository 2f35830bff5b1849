"""`porthal quantize`: a checkpoint in a published format of fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from porthal.cli import text
from porthal.cli.options import ModelOption
from porthal.cli.stopping import stoppable
from porthal.cli.text import print


def quantize(
    scheme: Annotated[str, typer.Option("--scheme", metavar="NAME", help="the format, see docs/checkpoints.md")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="a folder for it")],
    model: ModelOption = None,
) -> int:
    """Write a checkpoint in a published format of fewer bits, rounded to nearest, without calibration.

    Started again after it was stopped, it goes on where it was.
    """
    from porthal.model.load import DEMO
    from porthal.model.quantising import FORMATS, quantise

    with stoppable(), text.progress() as advance:
        quantise(model or DEMO, out, scheme, advance)
    print(f"{out}: {FORMATS[scheme].about}")
    return 0
