"""A model as graphs of ONNX: its step, of a prompt as of one token, and its draft."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from porthal.hal import Pages, UsageError, bind, create
from porthal.hal.scheme import NONE
from porthal.model.attention import LayerCache
from porthal.model.checkpoint import Checkpoint
from porthal.model.config import Config
from porthal.model.glm5 import Glm5
from porthal.model.load import fit

LENGTHS = (2, 1)  # of the requests in the step that is traced: rows and requests are free in the graph


def export(
    config: Config, source: Checkpoint, out: Path, dtype: str = "float32", block_size: int = 64, inline: bool = False
) -> list[Path]:
    """Write the step to `out`, its weights to OUT.data, and the draft of a model that has an MTP layer to OUT.draft.onnx.

    The step takes ids [rows], last_rows [requests], what a batch says of its rows and requests, and the cache's fields, each
    [slots, width]; it gives float32 logits [requests, vocabulary], hidden [rows, H], and the fields with the rows written, by
    their names with _after. The draft takes hidden as well: of the same rows, with the id of the token after each; its fields
    of the cache are its own. With `inline` there are no functions. Matrices that the checkpoint holds under a scheme stay
    codes. Files are written beside their names, and take them when all are whole. UsageError for what graphs cannot hold, or
    nobody can write.
    """
    data, draft = out.with_name(out.name + ".data"), out.with_name(out.stem + ".draft" + out.suffix)
    folder = next((path for path in (out, data, draft) if path.is_dir()), None)
    if folder or not out.parent.is_dir() or out.suffix != ".onnx":
        raise UsageError(f"{folder or out} cannot be written: expected a file that ends in .onnx, in a folder that exists")
    parts = {path.with_name(path.name + ".part"): path for path in (out, data, draft)}
    step_part, data_part, draft_part = parts
    graph: Any = create("onnxruntime:graph")
    try:
        with data_part.open("wb") as file:
            graph.weights_in(file, data.name)
            model = _model(graph, config, source, dtype, block_size)
        _traced(graph, model, step_part, draft_part, inline)
        written = [part for part in parts if part.exists()]
        for part in written:
            os.replace(part, parts[part])
        return [parts[part] for part in written]
    except OSError as error:
        raise UsageError(f"cannot write {error.filename or out}: {error.strerror}, give a writable folder") from None
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _model(graph: Any, config: Config, source: Checkpoint, dtype: str, block_size: int) -> Glm5:
    """The model on the graph: its weights are written."""
    if lost := sorted({config.latents, config.keys} - {NONE, *graph.caches}):
        raise UsageError(f"a cache is under {lost[0]}, which graphs have no codes for: expected {', '.join(graph.caches)}")
    if lost := sorted(set(source.kept().values()) - set(graph.schemes)):
        known = "a checkpoint of plain numbers or under " + ", ".join(graph.schemes)
        raise UsageError(f"{source.directory} is under {lost[0]}, which graphs have no codes for: expected {known}")
    ops, kept = fit(config, source, bind(backend=graph, overrides={}, fallback="error", check=False), dtype, block_size)
    return Glm5(config, source, ops, dtype, block_size, kept=kept)


def _traced(graph: Any, model: Glm5, step: Path, draft: Path, inline: bool) -> None:
    """Write the step's graph and, of a model with an MTP layer, the draft's."""
    cache, ops = model.new_cache(LENGTHS), model.ops
    layers = [LayerCache(layer.kv, layer.keys) for layer in cache.layers]
    batch = ops.plan(cache.step([cache.new_request() for _ in LENGTHS], LENGTHS))
    rows, requests = {0: "rows"}, {0: "requests"}
    ids = graph.input("ids", (batch.T,), "int32", rows)
    last = graph.input("last_rows", (batch.R,), "int32", requests)

    hidden = model.hidden(ids, batch, cache)
    logits = model.logits(ops.take_rows(hidden, last))
    main = len(model.blocks)
    graph.saved(step, "step", {"logits": logits, "hidden": hidden, **_after(layers[:main], cache.layers[:main])}, inline)
    if not model.mtp:
        return
    given = graph.input("hidden", hidden.shape, model.dtype, rows)
    drafted, _ = model.mtp.hidden(ids, model.embed, given, batch, cache.layers[main], None)
    logits = model.logits(ops.take_rows(drafted, last))
    outputs = {"logits": logits, "hidden_after": drafted, **_after(layers[main:], cache.layers[main:])}
    graph.saved(draft, "draft", outputs, inline)


def _after(before: Sequence[LayerCache], after: Sequence[LayerCache]) -> dict[str, Any]:
    """The arrays of caches as a step left them, by the names of those that it was given."""
    found: dict[str, Any] = {}
    for old, new in zip(before, after):
        pairs: list[tuple[Pages | None, Pages | None]] = [(old.kv, new.kv), (old.keys, new.keys)]
        for a, b in pairs:
            if a and b:
                found |= {array.name + "_after": b.native[part] for part, array in a.native.items()}
    return found
