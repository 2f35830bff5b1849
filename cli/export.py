"""`porthal export`: a model as graphs of ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from porthal.cli import text
from porthal.cli.options import CacheOption, Dtype, DtypeOption, ModelOption
from porthal.cli.text import print


def export(
    out: Annotated[Path, typer.Option("--out", metavar="FILE.onnx", help="the graph of a step")],
    model: ModelOption = None,
    dtype: DtypeOption = Dtype.float32,
    cache_scheme: CacheOption = None,
    inline: Annotated[bool, typer.Option("--inline", help="standard operators alone, without functions")] = False,
) -> int:
    """Write a model as graphs of ONNX: its step, of a prompt as of one token, and its draft, beside the weights of both."""
    from porthal.model.export import export as write
    from porthal.model.load import DEMO, opened

    written = write(*opened(model or DEMO, cache_scheme or ()), out, dtype.value, inline=inline)
    print("\n".join(f"{path}: {text.si(path.stat().st_size, 'B')}" for path in written))
    return 0
