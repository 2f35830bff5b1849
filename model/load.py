"""From a directory to a model, and from a config to the list of calls it makes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from porthal.hal import (
    FLOATS,
    Binding,
    Callers,
    CallSpec,
    NotClaimed,
    UsageError,
    bind,
    callers,
    contracts,
    note,
    recorded,
)
from porthal.model.checkpoint import Blank, Checkpoint
from porthal.model.config import Config, described
from porthal.model.generate import generate, step
from porthal.model.glm5 import Glm5
from porthal.model.layout import Layout
from porthal.model.tokens import ids_array

DEMO = Path(__file__).parent / "demo"
CACHES = (".k_scale", ".v_scale", ".kv_cache_scale", ".kv_cache_offset")  # what packers state for quantised caches
TURNED = ".kv_b_proj.weight"  # each head's part is cut and turned before it is used


def load(
    path: str | Path = DEMO,
    binding: Binding | None = None,
    *,
    dtype: str = "float32",
    block_size: int = 64,
    layout: Layout | None = None,
    caches: Sequence[str] = (),
) -> Glm5:
    """The model in a directory, on a binding (default: what the current policy selects for this model's calls).

    A binding that was made without a profile is made again, by its own policy, for the calls of this model in this dtype.
    dtype is that of activations, weights and caches; block_size is the tokens in a cache page; `caches` names the schemes of
    caches that hold codes, see `Config.cached`. UsageError for a directory that does not hold such a model; NotClaimed where
    an op is missing that greedy text needs: others fail when they are used.
    With a `layout` this is one rank's part, and every rank makes the same calls of the model; of experts only its own are read.
    """
    if dtype not in FLOATS:
        raise UsageError(f"dtype is {dtype!r}: expected one of {', '.join(FLOATS)}")
    if block_size < 1:
        raise UsageError(f"block_size is {block_size}: expected at least 1 token per page")
    config, source = opened(path, caches)
    fitted, kept = fit(config, source, binding or bind(), dtype, block_size, layout=layout.recorded() if layout else None)
    if layout:
        facts = {"backend": fitted.backend.name, "dtype": dtype, "layout": layout.kind, "checkpoint": source.digest()}
        facts |= {"experts": json.dumps(layout.table), "cache schemes": ", ".join(caches) or "none"}
        layout.comm.agree("load", {**facts, "config": hashlib.sha256(repr(config).encode()).hexdigest()[:16]})
    return Glm5(config, source, fitted, dtype, block_size, layout, kept)


def fit(
    config: Config,
    source: Checkpoint,
    binding: Binding,
    dtype: str,
    block_size: int = 64,
    drafts: int = 0,
    layout: Layout | None = None,
) -> tuple[Binding, Mapping[str, str]]:
    """The binding for a model's calls, and the tensors whose codes it takes as they are, each with its scheme; which, and why
    not, is said. One scheme after another is tried. Ranks of a layout, which cut matrices, keep none."""
    least = needed(config, drafts, layout)
    plain = fitted = binding.fitted(profile(config, dtype, block_size, layout), least)
    whole = {name: scheme for name, scheme in source.kept().items() if not name.endswith(TURNED)}
    kept: dict[str, str] = {}
    why: dict[str, str] = {}
    for scheme in dict.fromkeys(whole.values()):
        more = {name: each for name, each in whole.items() if each == scheme or name in kept}
        calls = profile(config, dtype, block_size, kept=tuple(more.items()))
        made, why[scheme] = (None, "ranks cut matrices") if layout else _also(binding, plain, calls, least)
        fitted, kept = (made, more) if made else (fitted, kept)
    found: Counter[tuple[str, str]] = Counter()
    for name, how in source.schemes.items():
        if name in kept:
            found[f"kept as {kept[name]}", how] += 1
        elif how:
            other = "they are turned before they are used" if name in source.kept() else "no call takes such codes and scales"
            found["read as plain numbers", f"{how}, since {why[whole[name]] if name in whole else other}"] += 1
    for (done, what), count in found.items():
        note(f"{source.directory}: matrices {done}: {count}, of {what}")
    return fitted, kept


def _also(
    binding: Binding, plain: Binding, calls: Mapping[str, Sequence[CallSpec]], least: Callers
) -> tuple[Binding | None, str]:
    """A binding that makes these calls, too; or None, and why there is none."""
    if binding.profile is None:
        return plain.also(calls, least)
    try:
        return binding.fitted(calls, least), ""
    except NotClaimed as error:
        return None, str(error)


def codes(path: str | Path, binding: Binding, dtype: str, caches: Sequence[str] = ()) -> Mapping[str, str]:
    """The tensors in a directory whose codes stay as they are on this binding, each with its scheme; none where no tensors are
    there to be looked at, or where the binding lacks an op."""
    try:
        config, source = opened(path, caches)
        return fit(config, source, binding, dtype)[1]
    except (UsageError, NotClaimed):
        return {}


def opened(path: str | Path, caches: Sequence[str] = ()) -> tuple[Config, Checkpoint]:
    """A directory's config and tensors, each of which a model reads or is known to do without, which is said.

    Judged by the headers, before anything large is read. UsageError names a tensor that is missing, not as expected, not
    used, or other than the one that is used in its place.
    """
    config = Config.read(path).cached(caches)
    kinds = described(path)
    source = Checkpoint(path, config.fp8_block)
    recorded(lambda ops: Glm5(config, source, ops))  # asks for every tensor that a model reads
    layers, embed, head = config.num_hidden_layers, "model.embed_tokens.weight", "lm_head.weight"
    mtp, main = f"model.layers.{layers}.", embed if config.tie_word_embeddings else head
    copies = {mtp + "embed_tokens.weight": embed, mtp + "shared_head.head.weight": main, head: main}
    skipped = {
        f"model.layers.{i}.self_attn.indexer.": "their layers share the selection of a layer below"
        for i in range(layers)
        if config.indexer_types[i] == "shared"
    }
    if not config.has_mtp:
        skipped[mtp] = "num_nextn_predict_layers is 0"
    without: Counter[str] = Counter()
    unused = []
    for name in source.unasked():
        why = next((why for prefix, why in skipped.items() if name.startswith(prefix)), "")
        if not why and name.endswith(CACHES):
            why = "no cache takes its scales from a checkpoint"
        if not why and name in copies:
            if not source.equal(name, copies[name], (config.vocab_size, config.hidden_size)):
                raise UsageError(f"{path}: {name!r} differs from {copies[name]!r}, which porthal uses in its place")
            why = "they repeat the embedding or the head"
        if why:
            without[why] += 1
        else:
            unused.append(name)
    if unused:
        more = f" and {len(unused) - 1} more" if unused[1:] else ""
        raise UsageError(
            f"{path} has tensor {unused[0]!r}{more}, of which a model with this config.json makes no use: "
            "correct config.json, or remove what is left over"
        )
    _check_experts(source.schemes, path)
    if other := [name for name, how in source.schemes.items() if name in kinds and (kinds[name] == "FLOAT") == bool(how)]:
        how = source.schemes[other[0]] or "not quantised"
        why = f"{other[0]!r} is {how}, the description says {kinds[other[0]]}"
        note(f"{path}: matrices read as their tensors say, not as quant_model_description.json does: {len(other)}, as {why}")
    for why, count in without.items():
        note(f"{path}: tensors not used: {count}, since {why}")
    return config, source


def _check_experts(schemes: Mapping[str, str], path: str | Path) -> None:
    """UsageError where the experts of a layer are quantised in several ways."""
    first: dict[tuple[str, str], str] = {}
    for name, scheme in schemes.items():
        layer, experts, rest = name.partition(".experts.")
        known = first.setdefault((layer, rest.partition(".")[2]), name) if experts else name
        if schemes[known] != scheme:
            found, expected = (how or "not quantised" for how in (scheme, schemes[known]))
            raise UsageError(f"{path}: {name!r} is {found}, expected the experts of a layer alike: {known!r} is {expected}")


def trace(
    config: Config,
    dtype: str = "float32",
    rows: int = 1,
    context: int | None = None,
    expand: bool = False,
    block_size: int = 64,
) -> list[tuple[str, CallSpec]]:
    """Every call of one step of `rows` query rows ending at `context` positions, without weights or values.

    Composites appear as such, or as the calls they are made of with expand=True.
    """
    calls = recorded(lambda ops: _step(_blank(config, ops, dtype, block_size), rows, context or rows), None if expand else ())
    composites = {op for op, contract in contracts().items() if contract.decomposition} if expand else set()
    return [(op, spec) for op, spec in calls if op not in composites]


def stepped(
    config: Config,
    requests: Sequence[tuple[int, int]],
    dtype: str = "float32",
    drafts: int = 0,
    block_size: int = 64,
    layout: Layout | None = None,
) -> list[tuple[str, CallSpec]]:
    """Every call of one step of generation, see `porthal.model.generate.step`, without weights or values; of the first rank
    of a layout, whose communicator has no wire."""
    longest = max(kv for _, kv in requests) + 2 * (drafts + 1)  # so that no text ends there
    endless = replace(config, eos_token_id=(), max_position_embeddings=longest)

    def made(ops: Binding) -> Callable[[], None]:
        return step(_blank(endless, ops, dtype, block_size, layout), requests, drafts)

    before = recorded(made, ())
    return recorded(lambda ops: made(ops)(), ())[len(before) :]


@lru_cache(maxsize=64)
def profile(
    config: Config,
    dtype: str = "float32",
    block_size: int = 64,
    layout: Layout | None = None,
    kept: tuple[tuple[str, str], ...] = (),
) -> Mapping[str, Sequence[CallSpec]]:
    """The calls a model makes, from one row to the whole context, by op: what a backend must claim to run it.

    It has both composites and what they are made of, since the binding decides which of them are called. Tensors of `kept`
    stay under their schemes.
    """
    longest = config.max_position_embeddings

    def blank(ops: Binding) -> Glm5:
        return _blank(config, ops, dtype, block_size, layout, dict(kept))

    def generated(ops: Binding) -> None:
        for temperature in (0.0, 1.0):
            for drafts in (0, 2) if config.has_mtp else (0,):
                _text(blank(ops), temperature, drafts)

    small = recorded(lambda ops: _step(blank(ops), 1, 1))
    large = recorded(lambda ops: _step(blank(ops), min(longest, 4096), longest))
    merged: dict[str, dict[CallSpec, None]] = {}
    for (op, low), (_, high) in zip(small, large):
        dims = {k: _span(v, high.dims[k]) for k, v in low.dims.items()}
        merged.setdefault(op, {})[CallSpec(dims, low.dtypes, low.attrs, low.schemes)] = None
    for op, spec in recorded(generated):
        known = merged.setdefault(op, {})
        if not any(other.covers(spec) for other in known):  # as those of the step over their whole range
            known[spec] = None
    return {op: list(specs) for op, specs in merged.items()}


@lru_cache(maxsize=64)
def needed(config: Config, drafts: int = 0, layout: Layout | None = None) -> Callers:
    """What a model calls for greedy text, and who calls it: what a backend cannot do without."""
    return callers(lambda ops: _text(_blank(config, ops, "float32", 64, layout), 0.0, drafts))


def _text(model: Glm5, temperature: float, drafts: int) -> None:
    model.config = replace(model.config, eos_token_id=())  # without values it emits token 0, which must not end the text
    generate(model, [[0]], 4, temperature=temperature, speculative=drafts)


def _span(low: int | tuple[int, int], high: int | tuple[int, int]) -> int | tuple[int, int]:
    """The range from one call's size to another's, or their one size."""
    assert isinstance(low, int) and isinstance(high, int)  # no ranges in a call
    return (low, high) if high != low else low


def _blank(
    config: Config,
    ops: Binding,
    dtype: str,
    block_size: int,
    layout: Layout | None = None,
    kept: Mapping[str, str] = MappingProxyType({}),
) -> Glm5:
    """A model without values."""
    return Glm5(config, Blank(), ops, dtype, block_size, layout, kept)


def _step(model: Glm5, rows: int, context: int) -> None:
    ops, cache = model.ops, model.new_cache([context])
    request = cache.new_request()
    cache.step([request], [context - rows])
    batch = cache.step([request], [rows])
    ids = ops.from_numpy(ids_array([0] * rows))
    hidden = model.hidden(ids, batch, cache)
    ops.argmax(model.logits(ops.take_rows(hidden, ops.from_numpy(batch.last_rows))))
    if model.mtp:
        model.mtp.hidden(ids, model.embed, hidden, batch, cache.layers[-1], None)
