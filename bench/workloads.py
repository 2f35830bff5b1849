"""Which calls are timed, and how many of each one step of a model makes.

A workload is derived from a model's config and the requests of a step, by recording the calls of a step without values. Each
call becomes a case of the conformance suite, whose token says everything of it, as large as memory and the time of its
judgement allow; where it had to be made smaller, `scaled` says of what, and `calls` how many of it make up a step's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from porthal.bench.scale import BLOCK_SIZE, Bounds, Sized
from porthal.bench.step import Whole
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import Request, spelled
from porthal.conformance.cases.profiles import home_of, profile_of
from porthal.hal import FLOATS, CallSpec, UsageError, collectives, contracts, note
from porthal.hal.scheme import NONE
from porthal.model.config import Config
from porthal.model.load import DEMO, stepped

REQUESTS = (1, 8, 64)
CONTEXTS = (2**10, 2**13, 2**15, 2**17)
CHUNKS = (512, 4096)
DRAFTS = 3
USUAL = 2**13  # keys that a request sees where a step is no table of contexts
STEPS = ("decode", "prefill", "verify")
# What is smaller than in GLM-5 in the model "half": half a billion parameters, without its MTP layer.
HALF: dict[str, Any] = {
    "vocab_size": 2**15, "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 16, "q_lora_rank": 512, "qk_nope_head_dim": 128, "v_head_dim": 128, "index_n_heads": 8,
    "index_topk": 256, "n_routed_experts": 32, "max_position_embeddings": 2**13, "indexer_types": ("full",) * 8,
    "dense": (True,) + (False,) * 7,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step: its kind, the requests that it consists of, the drafts of each, and what its group of rows is called."""

    kind: str
    requests: tuple[Request, ...]
    drafts: int = 0
    context: int = 0

    @property
    def group(self) -> str:
        n, rows = len(self.requests), self.requests[0].q
        what = f"{rows} rows" if self.kind == "prefill" else f"{n} request{'s' * (n > 1)}"
        return f"{self.kind}, {what}{f', {self.drafts} drafts' * (self.drafts > 0)}, context {_thousands(self.context)}"


@dataclass(frozen=True)
class Row:
    """A call in a group of rows: how often one step makes it, what was scaled, and the call as the step makes it."""

    step: str
    group: str
    case: Case
    calls: float
    scaled: str = ""
    spec: CallSpec | None = None


@dataclass(frozen=True)
class Workload:
    """The calls of steps, or a part of them.

    facts  what a report says of it: the config and the requests it was derived from
    whole  a step that can be made as a whole, since its checkpoint is here, or small enough to be made
    """

    name: str
    dtype: str
    rows: tuple[Row, ...]
    facts: Mapping[str, object] = field(default_factory=dict)
    whole: Whole | None = None
    part: bool = False

    def only(self, ops: Sequence[str], bounds: Bounds) -> Workload:
        """The rows of these ops; of one that no step calls, as that model's parts call it, or in the first listed sizes."""
        known = contracts()
        for op in ops:
            if op in collectives():
                raise UsageError(f"{op} is a call of several ranks: give --ranks N, too")
            if op not in known:
                raise UsageError(f"unknown op {op!r}: known are {', '.join(known)}")
        called = {row.case.op for row in self.rows}
        lone = [row for op in ops if op not in called for row in _alone(op, self.dtype, bounds)]
        return replace(self, rows=(*(row for row in self.rows if row.case.op in ops), *lone), whole=None, part=True)


def workload(name: str, kinds: Sequence[str], dtype: str, bounds: Bounds, caches: Sequence[str] = ()) -> Workload:
    """The workload of this name: a published model's decode steps, those of one of half a billion parameters, the demo
    checkpoint's, or what a file of `porthal trace --json` lists, or a data set of FlashInfer-Bench. `kinds` chooses steps,
    `dtype` "" is the model's own, `caches` are the schemes of a model's caches."""
    from porthal.bench import flashinfer
    from porthal.bench.traced import read

    if name == "glm5":
        return of_model(name, Config.read(home_of()).cached(caches), kinds, dtype or "bfloat16", bounds)
    if name == "demo":
        config = Config.read(DEMO).cached(caches)
        half = (Request(1, config.max_position_embeddings // 2),)
        whole = Whole("decode, 1 request at half of the context", half, caches=tuple(caches))
        return replace(of_model(name, config, kinds, dtype or "float32", bounds), whole=whole)
    if name == "half":
        config = half_config().cached(caches)
        made = [step for kind in kinds for step in half_steps(kind)]
        whole = Whole(made[-1].group, made[-1].requests, made[-1].drafts, config)
        return replace(of_steps(name, config, made, dtype or "bfloat16", bounds), whole=whole)
    if caches:
        raise UsageError(f"--cache-scheme {caches[0]} is for the steps of a model: expected --workload glm5, half or demo")
    if Path(name).is_dir() or name.endswith(".jsonl"):
        listed, left = flashinfer.read(Path(name))
        for sentence in left:
            note(f"porthal: {sentence}")
        parts = [_rows("alone", each.definition, [(each.op, each.spec)], each.requests, bounds) for each in listed]
        dtypes = dict.fromkeys(next(iter(each.spec.dtypes.values())) for each in listed)
        return Workload(Path(name).stem, ", ".join(dtypes), tuple(row for part in parts for row in part), {"file": name})
    found = read(name)
    rows = tuple(_rows("traced", found.name, found.calls, found.requests, bounds))
    return Workload(found.name, found.dtype, rows, {"file": name})


def half_config() -> Config:
    """The config of the model of half a billion parameters."""
    return replace(Config.read(home_of()), **HALF)


def of_model(name: str, config: Config, kinds: Sequence[str], dtype: str, bounds: Bounds) -> Workload:
    """The steps of a model, each call once per group, with the count of all layers."""
    made = [step for kind in kinds for step in steps(kind, config.max_position_embeddings, config.has_mtp)]
    return of_steps(name, config, made, dtype, bounds)


def of_steps(name: str, config: Config, made: Sequence[Step], dtype: str, bounds: Bounds) -> Workload:
    """These steps of a model."""
    rows: list[Row] = []
    for step in made:
        calls = stepped(config, [(r.q, r.kv) for r in step.requests], dtype, step.drafts)
        rows += _rows(step.kind, step.group, calls, step.requests, bounds)
    composition = {step.group: spelled(step.requests) for step in made}
    sizes = {f.name: v for f in fields(config) if type(v := getattr(config, f.name)) in (int, float)}
    schemes = [s for s in (config.keys, config.latents) if s != NONE]
    facts = {"config": sizes, "dtype": dtype, "composition": composition, **({"caches": schemes} if schemes else {})}
    return Workload(name, dtype, tuple(rows), facts)


def steps(kind: str, longest: int, drafts: bool = True) -> Iterator[Step]:
    """The steps of a kind, as far as a model's context goes."""
    if kind not in STEPS:
        raise UsageError(f"unknown step {kind!r}: expected {', '.join(STEPS)}")
    if kind == "prefill":
        for rows in CHUNKS:
            if rows <= longest:
                context = min(max(rows, USUAL), longest)
                yield Step(kind, (Request(rows, context),), context=context)
    elif kind == "verify":
        context = min(USUAL, longest)
        for n in REQUESTS if drafts else ():
            yield Step(kind, (Request(DRAFTS + 1, context),) * n, DRAFTS, context)
    else:
        for n in REQUESTS:
            for context in dict.fromkeys(min(c, longest) for c in CONTEXTS):
                yield Step(kind, (Request(1, context),) * n, context=context)


def half_steps(kind: str) -> Iterator[Step]:
    """The steps of a kind that are timed of the model "half": one request at 1k, and of prompts 4k as well."""
    if kind not in STEPS:
        raise UsageError(f"unknown step {kind!r}: expected {', '.join(STEPS)}")
    rows = {"decode": (1,), "verify": (DRAFTS + 1,), "prefill": (2**10, 2**12)}[kind]
    for n in rows:
        context = max(n, 2**10)
        yield Step(kind, (Request(n, context),), DRAFTS * (kind == "verify"), context)


def _rows(
    step: str, group: str, calls: Sequence[tuple[str, CallSpec]], requests: tuple[Request, ...], bounds: Bounds
) -> Iterator[Row]:
    found: dict[Case, Row] = {}
    for (op, spec), count in Counter(calls).items():
        sized = Sized.of(op, spec, requests).within(bounds)
        before = found.get(sized.case)
        times = count * sized.stands_for + (before.calls if before else 0)
        found[sized.case] = Row(step, group, sized.case, times, sized.scaled, before.spec if before else spec)
    yield from found.values()


def _alone(op: str, dtype: str, bounds: Bounds) -> Iterator[Row]:
    """An op by itself, in the sizes that the model's parts have or the contract lists first, for some requests."""
    contract = contracts()[op]
    for n in REQUESTS:
        requests = (Request(1, USUAL),) * n
        for spec in profile_of().of(contract):
            sizes = {d: size for o in contract.signature.of_kind("Batch") for d, size in zip(o.dims[1:], (n, USUAL))}
            sizes |= {"block_size": BLOCK_SIZE} if "block_size" in contract.facts() else {}
            sizes |= {s: v[0] if isinstance(v, tuple) else v for s, v in spec.dims.items() if s not in sizes}
            if contract.rows:
                rows = spec.dims.get(contract.rows, n)
                sizes[contract.rows] = rows[0] * n if isinstance(rows, tuple) else rows
            kinds = {o: dtype if t in FLOATS and t != "float32" else t for o, t in spec.dtypes.items()}
            exact = CallSpec(sizes, kinds, spec.attrs, {})
            yield from _rows("alone", f"{op} alone, {n} request{'s' * (n > 1)}", [(op, exact)], requests, bounds)


def _thousands(n: int) -> str:
    return f"{n >> 10}k" if n % 2**10 == 0 else str(n)
