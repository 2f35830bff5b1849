"""`porthal explain`: whose kernels a model runs on."""

from __future__ import annotations

from porthal.cli import text
from porthal.cli.options import BackendOption, CacheOption, Dtype, DtypeOption, EmulatedFlag, JsonFlag, ModelOption
from porthal.cli.selecting import named
from porthal.cli.text import print


def explain(
    model: ModelOption = None,
    backend: BackendOption = None,
    dtype: DtypeOption = Dtype.float32,
    emulated: EmulatedFlag = False,
    cache_scheme: CacheOption = None,
    json: JsonFlag = False,
) -> int:
    """Per op: whose kernel a model runs on, and why. Exit code 1 when greedy text needs an op that is missing."""
    from porthal.hal import Binding, Choice, NotClaimed, bind, called, create, running
    from porthal.model.config import Config
    from porthal.model.load import DEMO, codes, profile
    from porthal.model.load import needed as called_by

    caches = cache_scheme or ()
    config = Config.read(model or DEMO).cached(caches) if model or (DEMO / "config.json").is_file() else None
    made = create(named(backend, emulated), emulated)
    with running(made):
        bare = bind(backend=made)
        kept = codes(model, bare, dtype.value, caches) if model else {}
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
        if made.alternatives():
            print(made.tuned.why or f"where there are several kernels, what was measured here on {made.tuned.date} decides")
        judged = f"for {model or 'the demo checkpoint'} in {dtype.value}" if needed else "without a model's profile"
        print(f"{bare.backend} ({bare.backend.place}), {judged}: {counts.summary()}")
    return 1 if missing else 0
