"""`porthal explain`: whose kernels a model runs on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from porthal.cli import text
from porthal.cli.options import BackendOption, CacheOption, Dtype, DtypeOption, EmulatedFlag, JsonFlag
from porthal.cli.selecting import named
from porthal.cli.text import print

if TYPE_CHECKING:
    from collections.abc import Mapping

    from porthal.hal import Backend, Choice


def explain(
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="or glm-5, glm-5.2: sizes alone; default: the demo checkpoint")
    ] = None,
    backend: BackendOption = None,
    dtype: DtypeOption = Dtype.float32,
    emulated: EmulatedFlag = False,
    cache_scheme: CacheOption = None,
    json: JsonFlag = False,
) -> int:
    """Per op: whose kernel a model runs on, and why. Exit code 1 when greedy text needs an op that is missing."""
    from porthal.conformance.cases.profiles import home_of
    from porthal.hal import Binding, Choice, NotClaimed, bind, called, create, running
    from porthal.model.config import Config
    from porthal.model.load import DEMO, codes, profile
    from porthal.model.load import needed as called_by

    caches = cache_scheme or ()
    home = home_of(model) if model else DEMO
    config = Config.read(home).cached(caches) if model or (DEMO / "config.json").is_file() else None
    made = create(named(backend, emulated), emulated)
    with running(made):
        bare = bind(backend=made)
        kept = codes(home, bare, dtype.value, caches) if model else {}
        needed = profile(config, dtype.value, kept=tuple(kept.items())) if config else {}
        choices = dict(bare.choices)
        for op, specs in needed.items():  # one at a time: what is missing becomes a row, not an error
            try:
                choices[op] = bind(profile={op: specs}, backend=made).choices[op]
            except NotClaimed as error:
                choices[op] = Choice(op, "missing", "", "", str(error))
    missing = [op for op in called(choices, called_by(config)) if choices[op].status == "missing"] if config else []
    counts = Binding(bare.backend, choices, {})
    if json:
        facts = ("op", "status", "owner", "provider", "reason", "tie")
        rows = [{**{f: getattr(c, f) for f in facts}, "needed": op in needed} for op, c in choices.items()]
        place = bare.backend.place
        text.as_json({"backend": str(bare.backend), "place": place, "ops": rows, "counts": counts.counts()})
    else:
        head = ["op", "kernel", "owner", "provider", "reason"]
        text.table(head, [[c.op, c.status, c.owner, c.provider, c.reason] for c in choices.values()])
        print(bare.backend.describe())
        if made.alternatives() and made.place == "hardware":
            print(_measured(made, choices))
        judged = f"for {model or 'the demo checkpoint'} in {dtype.value}" if needed else "without a model's profile"
        print(f"{bare.backend} ({bare.backend.place}), {judged}: {counts.summary()}")
    return 1 if missing else 0


def _measured(made: Backend, choices: Mapping[str, Choice]) -> str:
    """What times of several kernels have to do with these choices."""
    if made.tuned.why:
        return f"{made.tuned.why}: run porthal tune --backend {made}"
    if any(choice.reason.startswith("measured: ") for choice in choices.values()):
        return f"where there are several kernels, what was measured here on {made.tuned.date} decides"
    return f"what was measured here on {made.tuned.date} is of no such call: porthal tune takes --workload, --op and --dtype"
