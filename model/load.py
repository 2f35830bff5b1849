"""From a directory to a model, and from a config to the list of calls it makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from porthal.hal import FLOATS, Binding, CallSpec, UsageError, bind, contracts
from porthal.hal.abstract import Abstract
from porthal.model.checkpoint import Blank, Checkpoint
from porthal.model.config import Config
from porthal.model.glm5 import Glm5
from porthal.model.tokens import ids_array

DEMO = Path(__file__).parent / "demo"


def load(path: str | Path = DEMO, binding: Binding | None = None, *, dtype: str = "float32") -> Glm5:
    """The model in a directory, on a binding (default: what the current policy selects for this model's profile).

    dtype is that of activations, weights and caches. UsageError for a directory that does not hold such a model.
    """
    if dtype not in FLOATS:
        raise UsageError(f"dtype is {dtype!r}: expected one of {', '.join(FLOATS)}")
    config = Config.read(path)
    source = Checkpoint(path, config.fp8_block)
    return Glm5(config, source, binding or bind(profile=profile(config, dtype)), dtype)


def trace(
    config: Config, dtype: str = "float32", rows: int = 1, context: int | None = None, expand: bool = False
) -> list[tuple[str, CallSpec]]:
    """Every call of one step of `rows` query rows ending at `context` positions, without weights or values.

    Composites appear as such, or as the calls they are made of with expand=True.
    """
    calls: list[tuple[str, CallSpec]] = []

    def record(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            operands, attrs = known[op].arrange(args, kwargs)
            calls.append((op, known[op].spec(operands, attrs)))
            return function(*args, **kwargs)

        return call

    known = contracts()
    composed = {name: "composed" for name, c in known.items() if c.decomposition} if expand else {}
    ops = bind(backend=Abstract(), overrides=composed, fallback="error", check=False, wrap=(record,))
    model = Glm5(config, Blank(), ops, dtype)
    context = context or rows
    cache = model.new_cache(-(-context // 64))
    request = cache.new_request()
    cache.step([request], [context - rows])
    batch = cache.step([request], [rows])
    ids = ops.from_numpy(ids_array([0] * rows))
    hidden = model.hidden(ids, batch, cache)
    last = ops.take_rows(hidden, ops.from_numpy(batch.last_rows))
    ops.argmax(model.logits(last))
    if model.mtp:
        model.mtp.hidden(ids, model.embed, hidden, batch, cache.layers[-1], None)
    if expand:
        calls = [(op, spec) for op, spec in calls if op not in composed]
    return calls


def profile(config: Config, dtype: str = "float32") -> dict[str, list[CallSpec]]:
    """The calls a model makes, from one row to the whole context, by op: what a backend must claim to run it."""
    longest = config.max_position_embeddings
    merged: dict[str, dict[Any, CallSpec]] = {}
    for expand in (False, True):
        small = trace(config, dtype, 1, 1, expand)
        large = trace(config, dtype, min(longest, 4096), longest, expand)
        for (op, low), (_, high) in zip(small, large):
            dims = {k: (v, high.dims[k]) if high.dims[k] != v else v for k, v in low.dims.items()}
            spec = CallSpec(dims, low.dtypes, low.attrs, low.schemes)
            merged.setdefault(op, {})[spec.key()] = spec
    return {op: list(specs.values()) for op, specs in merged.items()}
