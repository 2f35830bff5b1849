"""A model as graphs of ONNX: its step, of a prompt as of one token, and its draft."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from porthal.hal import Pages, UsageError, bind, create
from porthal.model.attention import LayerCache
from porthal.model.checkpoint import Source
from porthal.model.config import Config
from porthal.model.glm5 import Glm5

LENGTHS = (2, 1)  # of the requests in the step that is traced: rows and requests are free in the graph


def export(
    config: Config, source: Source, out: Path, dtype: str = "float32", block_size: int = 64, inline: bool = False
) -> list[Path]:
    """Write the step to `out`, its weights to OUT.data, and the draft of a model that has an MTP layer to OUT.draft.onnx.

    The step takes ids [rows], last_rows [requests], what a batch says of its rows and requests, and the cache's fields, each
    [slots, width]; it gives float32 logits [requests, vocabulary], hidden [rows, H], and the fields with the rows written, by
    their names with _after. The draft takes hidden as well: of the same rows, with the id of the token after each. Both
    have the same cache, and with `inline` no functions. Files are written beside their names, and take them when all is there.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise UsageError(f"{out} cannot be written: expected a file in a folder that exists")
    graph: Any = create("onnxruntime:graph")
    data = out.with_name(out.name + ".data")
    part = data.with_name(data.name + ".part")
    try:
        with part.open("wb") as file:
            graph.weights_in(file, data.name)
            ops = bind(backend=graph, overrides={}, fallback="error", check=False)
            model = Glm5(config, source, ops, dtype, block_size)
        os.replace(part, data)
    except OSError as error:
        raise UsageError(f"cannot write {error.filename or part}: {error.strerror}, give a writable folder") from None
    finally:
        part.unlink(missing_ok=True)

    cache = model.new_cache(LENGTHS)
    layers = [LayerCache(layer.kv, layer.keys) for layer in cache.layers]
    batch = ops.plan(cache.step([cache.new_request() for _ in LENGTHS], LENGTHS))
    rows, requests = {0: "rows"}, {0: "requests"}
    ids = graph.input("ids", (batch.T,), "int32", rows)
    last = graph.input("last_rows", (batch.R,), "int32", requests)

    hidden = model.hidden(ids, batch, cache)
    logits = model.logits(ops.take_rows(hidden, last))
    main = len(model.blocks)
    graph.saved(out, "step", {"logits": logits, "hidden": hidden, **_after(layers[:main], cache.layers[:main])}, inline)
    if not model.mtp:
        return [out, data]
    given = graph.input("hidden", hidden.shape, dtype, rows)
    drafted, _ = model.mtp.hidden(ids, model.embed, given, batch, cache.layers[main], None)
    logits = model.logits(ops.take_rows(drafted, last))
    draft = out.with_name(out.stem + ".draft" + out.suffix)
    outputs = {"logits": logits, "hidden_after": drafted, **_after(layers[main:], cache.layers[main:])}
    graph.saved(draft, "draft", outputs, inline)
    return [out, data, draft]


def _after(before: Sequence[LayerCache], after: Sequence[LayerCache]) -> dict[str, Any]:
    """The arrays of caches as a step left them, by the names of those that it was given."""
    found: dict[str, Any] = {}
    for old, new in zip(before, after):
        pairs: list[tuple[Pages | None, Pages | None]] = [(old.kv, new.kv), (old.keys, new.keys)]
        for a, b in pairs:
            if a and b:
                found |= {a.native[field].name + "_after": b.native[field] for field, _ in a.spec.fields}
    return found
