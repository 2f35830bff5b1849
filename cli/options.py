"""The options that several commands share, and what their words mean."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from porthal.conformance.level import LEVELS

Chosen = TypeVar("Chosen", bound=Enum)


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Base(str, Enum):
    reference = "reference"
    torch = "torch"


def dtype_of(text: str) -> Dtype:
    """A dtype by its name, or as tokens write it."""
    return _one_of(Dtype, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(text, text))


def _one_of(kind: type[Chosen], text: str) -> Chosen:
    try:
        return kind(text)
    except ValueError:
        names = ", ".join(repr(each.value) for each in kind)
        raise typer.BadParameter(f"{text!r} is not one of {names}.") from None


def share_of(text: str | float) -> float:
    """A share as people write it, "5%"; a default is one already."""
    if isinstance(text, float):
        return text
    number = text[:-1] if text.endswith("%") else ""
    if not number.replace(".", "", 1).isdecimal() or not number.isascii() or not 0 <= float(number) <= 100:
        raise typer.BadParameter(f"{text!r} is not a share: expected 0% to 100%, like 5%.")
    return float(number) / 100


Level = Enum("Level", {name.replace("-", "_"): name for name in LEVELS}, type=str)  # type: ignore[misc]
LOWEST, HIGHER = Level("bring-up"), Level("standard")

BackendOption = Annotated[
    str | None,
    typer.Option("--backend", metavar="NAME[:DEVICE]", help="default: PORTHAL_BACKEND, else the first available"),
]
ModelOption = Annotated[Path | None, typer.Option("--model", metavar="DIR", help="default: the demo checkpoint")]
SizesOption = Annotated[
    Path | None,
    typer.Option("--model", metavar="DIR", help="whose sizes the large calls have, or glm-5, glm-5.2; default: glm-5"),
]
PropertiesOption = Annotated[
    int, typer.Option("--properties", metavar="N", min=0, help="also draw N cases per op; needs hypothesis")
]
SeedOption = Annotated[int, typer.Option(metavar="N", min=0, help="of what --properties draws")]
DTYPES = "[float32|bfloat16|float16]"
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", parser=dtype_of, metavar=DTYPES, help="of activations, weights and caches")
]
CacheOption = Annotated[
    list[str] | None,
    typer.Option("--cache-scheme", metavar="NAME", help="of few bits, as fp8_keys, int8_latents; one for each cache"),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="print JSON")]

PeersOption = Annotated[
    Path | None, typer.Option("--peers", metavar="FILE", help="backends that have an interpreter of their own, by name")
]
EmulatedFlag = Annotated[bool, typer.Option("--emulated", help="emulate the device of the named backend on this CPU")]
WORKERS = min(2, os.cpu_count() or 1)
WorkersOption = Annotated[int, typer.Option(metavar="N", min=1, help="processes that share the work")]
TimeoutOption = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="for one case")]
MemoryOption = Annotated[float, typer.Option("--memory", metavar="GIB", help="for one case, in a worker")]
LevelOption = Annotated[
    Level,
    typer.Option(
        "--level",
        parser=lambda text: _one_of(Level, text),
        metavar=f"[{'|'.join(LEVELS)}]",
        help="how many cases, and how strictly they are judged",
    ),
]

TemperatureOption = Annotated[
    float | None,
    typer.Option(metavar="T", help="above 0 draws tokens; default: 0, greedy, whatever generation_config.json says"),
]
TopPOption = Annotated[
    float | None,
    typer.Option(metavar="P", help="draw from the likeliest that reach P together; default: generation_config.json's, else 1"),
]
TopKOption = Annotated[
    int | None,
    typer.Option(metavar="K", help="draw from the K likeliest, 0: all; default: generation_config.json's, else 0"),
]
SampleFlag = Annotated[
    bool, typer.Option("--sample", help="draw at generation_config.json's own temperature; it must have do_sample")
]
