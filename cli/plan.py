"""`porthal plan`: how a model would lie on many devices, and how fast it would be there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from porthal.cli import text
from porthal.cli.options import Dtype, JsonFlag, dtype_of
from porthal.cli.text import print

BEST = 3  # layouts that are printed


def plan(
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="here, or one of bench/devices.json")],
    devices: Annotated[int, typer.Option("--devices", metavar="N", help="how many of them")],
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="config.json is enough, or glm-5, glm-5.2; default: glm-5")
    ] = None,
    context: Annotated[int, typer.Option("--context", metavar="L", help="tokens of each request")] = 8192,
    batch: Annotated[int, typer.Option("--batch", metavar="B", help="requests, each of which gets a token in a step")] = 1,
    scheme: Annotated[str, typer.Option("--scheme", metavar="NAME", help="of the weights, see docs/schemes.md")] = "",
    dtype: Annotated[
        Dtype, typer.Option("--dtype", parser=dtype_of, metavar="DTYPE", help="of all else; default: bfloat16")
    ] = Dtype.bfloat16,
    json: JsonFlag = False,
) -> None:
    """Memory, tokens per second and what limits them, of the three fastest layouts of a decode step, from figures on paper.

    tp devices share attention heads and dense layers, dp such groups have requests of their own, experts lie on groups of ep.
    """
    from porthal.bench.plan import Asked, Device, plans
    from porthal.bench.text import time_text
    from porthal.conformance.cases.profiles import MODEL, home_of
    from porthal.model.config import Config

    asked = Asked(devices, context, batch, dtype.value, scheme)
    config = Config.read(home_of(model or Path(MODEL)))
    asked.sized(config)
    chosen = Device.named(device, devices)
    found = plans(config, chosen, asked)
    if json:
        made = [{**asdict(p), "seconds": p.seconds, "tokens_per_second": p.rate, "limit": p.limit} for p in found[:BEST]]
        text.as_json({"device": asdict(chosen), "asked": asdict(asked), "plans": made})
        return
    print(f"{devices} x {chosen.what}; {batch} requests at {context} tokens, {scheme or dtype.value}")
    print("predicted, where nothing overlaps:")
    rows = []
    for p in found[:BEST]:
        shares = ", ".join(f"{name} {seconds / p.seconds:.0%}" for name, seconds in p.parts.items() if seconds)
        memory = f"{text.si(p.memory, 'B')} of {text.si(chosen.memory, 'B')}"
        rows.append([f"tp {p.tp}, ep {p.ep}, dp {p.dp}", memory, time_text(p.seconds), f"{p.rate:.4g}", p.limit, shares])
    text.table(["layout", "memory per device", "step", "tokens/s", "limit", "of the step"], rows)
    for source in chosen.sources:
        print(f"  {source}")
