"""How a model would lie on many devices, and what a decode step would take there: on paper, from stated or measured figures.

A step is the calls that the model records: each takes what its contract's cost takes at the device's rates, and what any call
takes beside. A layout has groups of `tp` devices that share attention heads and dense layers, `dp` of them, each with requests
of its own, and experts on groups of `ep` devices. Nothing overlaps.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from math import ceil, inf, prod
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from porthal.bench.roofline import ARITHMETIC
from porthal.bench.worker import Backstage
from porthal.hal import CallSpec, Communicator, CommunicatorSpec, UsageError, contracts
from porthal.hal.dtypes import itemsize
from porthal.hal.scheme import WEIGHTS, scheme_of
from porthal.hal.signature import evaluate
from porthal.model.config import Config
from porthal.model.layout import Layout
from porthal.model.load import stepped

DEVICES = Path(__file__).parent / "devices.json"
HERE = "here"  # a thread of this machine, whose rates are measured; where there are more than processors they take turns
BURSTS = 5  # of each rate
LATENCY, SUM, CALL = 60e-6, 15e-6, 40e-6  # of ranks on this machine, and of a call from Python: docs/results/plan.md
FASTER = {"int8": "int8", "float8_e4m3fn": "fp8"}  # codes that are multiplied as they are, and the rate of these
SUMS = {"all_reduce": 2, "all_gather_v": 1}  # how often a ring moves what they are given


@dataclass(frozen=True)
class Device:
    """What a device and its links can do, per second.

    memory     bytes that it holds; `bandwidth` those that it reads
    rates      operations, by dtype or "int8", "fp8"
    node       how many devices a node has, between which `link` carries bytes in one direction; `network` those to other nodes
    latency    seconds of an exchange of nothing; `call` what a call takes beside its work
    sums       seconds of a sum of nothing, where that is known; else as much as an exchange
    """

    name: str
    what: str
    memory: float
    bandwidth: float
    rates: Mapping[str, float]
    node: int
    link: float
    network: float
    latency: float
    call: float
    sources: tuple[str, ...]
    sums: float | None = None

    @classmethod
    def named(cls, name: str, devices: int) -> Device:
        """One of devices.json, or this machine with so many ranks; UsageError where it is neither."""
        known = json.loads(DEVICES.read_text())
        if name == HERE:
            return _here(devices)
        if name not in known:
            raise UsageError(f"device is {name!r}: expected {HERE} or one of {', '.join(known)}")
        return cls(name, **{**known[name], "sources": tuple(known[name]["sources"])})

    def seconds(self, flops: float, moved: float, rate: str) -> tuple[float, str]:
        """What a call's work takes, and what binds it."""
        times = {"arithmetic": flops / self.rates[rate], "memory": moved / self.bandwidth}
        bound = max(times, key=lambda each: times[each])
        return times[bound], bound

    def exchange(self, moved: float, group: int) -> float:
        """Seconds in which each of a group sends so many bytes, equally many to each."""
        if group == 1:
            return 0.0
        near = min(group, self.node)
        inside, outside = (moved * part / group for part in (near - 1, group - near))
        return self.latency + max(inside / self.link, outside / self.network)

    def sum(self, moved: float, group: int) -> float:
        """Seconds in which a group adds so many bytes of each, or gathers them: twice, or once, what a ring moves."""
        if group == 1:
            return 0.0
        nothing = self.latency if self.sums is None else self.sums
        return nothing + moved * (group - 1) / group / (self.link if group <= self.node else self.network)


def _here(devices: int) -> Device:
    """A rank of so many on this machine, by the limits that the cpu backend measures for one thread."""
    with closing(Backstage("cpu", 1)) as worker:
        peaks = [peak for peak in worker.side.holds if peak in ("dram", "copy", *ARITHMETIC.values())]
        found = {peak: median(worker.ask("peak", peak) for _ in range(BURSTS)) for peak in peaks}
    turns = max(1.0, devices / len(os.sched_getaffinity(0)))
    found = {peak: rate / turns for peak, rate in found.items()}
    rates = {rate: found[rate] for rate in ARITHMETIC.values() if rate in found}
    what = f"a thread of this machine, {devices} of which take turns" if turns > 1 else "a thread of this machine"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    link = found["copy"] / 2  # of which half is read
    facts = (what, memory, found["dram"], rates, devices, link, link, LATENCY * turns, CALL * turns)
    sources = "rates, bandwidth, link: measured now", "latency, sums, call: docs/results/plan.md"
    return Device(HERE, *facts, sources, SUM * turns)


@dataclass(frozen=True)
class Plan:
    """A layout, and what one decode step of `batch` requests at `context` takes on it."""

    tp: int
    ep: int
    dp: int
    batch: int
    memory: float
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def rate(self) -> float:
        """Tokens per second of all devices."""
        return self.batch / self.seconds

    @property
    def limit(self) -> str:
        return max(self.parts, key=lambda each: self.parts[each])


@dataclass(frozen=True)
class Asked:
    """What is to be planned: so many requests with one new token each at a context, and a scheme of the weights or ""."""

    devices: int
    context: int
    batch: int
    dtype: str = "bfloat16"
    scheme: str = ""

    def sized(self, config: Config) -> None:
        """UsageError where it asks for more than can be, or less."""
        most = {"devices": 2**16, "context": config.max_position_embeddings, "batch": 2**20}
        for name, limit in most.items():
            if not 1 <= getattr(self, name) <= limit:
                raise UsageError(f"--{name} is {getattr(self, name)}: expected 1 to {limit}")
        if self.scheme and self.scheme not in WEIGHTS:
            raise UsageError(f"--scheme is {self.scheme!r}: expected one of {', '.join(WEIGHTS)}")

    def check(self, config: Config, device: Device) -> None:
        """UsageError where it cannot be planned."""
        self.sized(config)
        if self.rate not in device.rates:
            known, what = ", ".join(device.rates), self.scheme or self.dtype
            raise UsageError(f"{what} needs a rate of {self.rate}, and of {device.name} are known {known}: choose another")

    @property
    def plain(self) -> str:
        """The rate of products of plain numbers."""
        return ARITHMETIC[self.dtype]

    @property
    def rate(self) -> str:
        """That of products with weights."""
        scheme = scheme_of(self.scheme) if self.scheme else None
        return FASTER.get(scheme.codes, self.plain) if scheme and scheme.other else self.plain

    @property
    def width(self) -> float:
        """Bytes of a weight."""
        if not self.scheme:
            return itemsize(self.dtype)
        scheme = scheme_of(self.scheme)
        each = 0.5 if "4" in scheme.codes.removeprefix("float8_e4") else 1.0
        block = prod(size for size in scheme.block if size)
        return each + (itemsize(scheme.form((1, 1))["scale"][1]) / block if 0 not in scheme.block else 0.0)


def plans(config: Config, device: Device, asked: Asked) -> list[Plan]:
    """The layouts that fit into the devices' memory, the fastest first; UsageError where there is none."""
    asked.check(config, device)
    found, least = [], inf
    for tp in _divisors(asked.devices):
        layout = Layout(Communicator(CommunicatorSpec(0, tp), None), "tp+ep")
        try:
            layout.fits(config)
        except UsageError:  # heads that do not divide
            continue
        step = _Step(config, device, asked, layout)
        for ep in _divisors(asked.devices):
            if ep <= config.n_routed_experts:
                made = step.plan(ep)
                least = min(least, made.memory)
                found += [made] if made.memory <= device.memory else []
    if not found:
        needs = f"{least / 1e9:.3g} GB per device, and {asked.devices} with {device.memory / 1e9:.3g} GB are given"
        raise UsageError(f"the model does not fit: the leanest layout needs {needs}: give more devices, or less to do")
    return sorted(found, key=lambda each: each.seconds)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


class _Step:
    """The calls of one device of a group that shares heads, as the model records them for one and two requests of each."""

    def __init__(self, config: Config, device: Device, asked: Asked, layout: Layout) -> None:
        self.config, self.device, self.asked, self.tp = config, device, asked, layout.comm.size
        shallow = config.shallow()
        one, two = (
            stepped(shallow, [(1, asked.context)] * (n * self.tp), asked.dtype, layout=layout) for n in (1, 2)
        )
        counts = Counter(zip(config.dense, config.indexer_types))
        layers = [counts[kind] for kind in zip(shallow.dense, shallow.indexer_types)]
        last = max(i for i, (op, _) in enumerate(one) if op == "add_rms_norm")
        starts = [i for i, (op, _) in enumerate(one) if op == "mla_prolog"]
        self.calls = []  # each with the number of layers that make it
        for i, ((op, first), (_, second)) in enumerate(zip(one, two)):
            layer = sum(start <= i for start in starts)
            self.calls.append((op, first, second, layers[layer - 1] if layer and i <= last else 1))
        self.experts = sum(not dense for dense in config.dense)

    def plan(self, ep: int) -> Plan:
        c, asked, device = self.config, self.asked, self.device
        dp = asked.devices // self.tp
        each = ceil(asked.batch / dp) / self.tp  # requests per device
        parts: defaultdict[str, float] = defaultdict(float)
        weights = 0.0
        for op, one, two, times in self.calls:
            if op in contracts() and op != "moe_experts":
                first, second = (self._cost(op, spec) for spec in (one, two))
                flops, moved = (a + (each - 1) * (b - a) for a, b in zip(first, second))
                seconds, bound = device.seconds(flops, moved, self._rate(op, one))
                parts[bound] += times * seconds
                parts["calls"] += times * device.call
                weights += times * self._held(op, one)
        row = c.hidden_size * itemsize(asked.dtype)
        group = each * self.tp * row
        parts["all-reduce"] += sum(
            times * device.sum(group * SUMS[op], self.tp) for op, _, _, times in self.calls if op in SUMS
        )
        sent = each * c.num_experts_per_tok
        coded = c.hidden_size * (1.0 if self.asked.rate in ("int8", "fp8") else itemsize(asked.dtype))
        parts["all-to-all"] += self.experts * (device.exchange(sent * coded, ep) + device.exchange(sent * row, ep))
        mine = c.n_routed_experts / ep
        met = mine * (1 - (1 - 1 / mine) ** sent) if mine > 1 else min(1.0, sent)
        size = 3 * c.hidden_size * c.moe_intermediate_size
        seconds, bound = device.seconds(2 * size * sent, met * size * asked.width + 2 * sent * row, asked.rate)
        parts[bound] += self.experts * seconds
        parts["calls"] += self.experts * device.call
        weights += self.experts * ceil(mine) * size * asked.width
        keys = sum(kind == "full" for kind in c.indexer_types) * c.index_head_dim
        cached = c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim) + keys
        cache = ceil(asked.batch / dp) * asked.context * cached * itemsize(asked.dtype)
        return Plan(self.tp, ep, dp, asked.batch, weights + cache, dict(parts))

    def _quantised(self, op: str, spec: CallSpec) -> bool:
        """Whether the weights of a call are: all but the router's and those of the logits."""
        return bool(self.asked.scheme) and spec.attrs.get("out") != "float32"

    def _rate(self, op: str, spec: CallSpec) -> str:
        weights = contracts()[op].signature.of_kind("Weight")
        return self.asked.rate if weights and self._quantised(op, spec) else self.asked.plain

    def _widths(self, op: str, spec: CallSpec) -> dict[str, float]:
        contract = contracts()[op]
        kinds = {**spec.dtypes, **{r.name: kind for r, _, kind in contract.results(spec)}}
        width = {o.name: float(itemsize(kinds[o.name])) if kinds.get(o.name) else 0.0
                 for o in (*contract.signature.operands, *contract.signature.results)}  # fmt: skip
        return width | {name: self.asked.width for name in contract.schemes if name in width and self._quantised(op, spec)}

    def _cost(self, op: str, spec: CallSpec) -> tuple[float, float]:
        return contracts()[op].cost(SimpleNamespace(**spec.attrs, **spec.dims), SimpleNamespace(**self._widths(op, spec)))

    def _held(self, op: str, spec: CallSpec) -> float:
        """Bytes of the weights of a call."""
        env, width = {**spec.attrs, **spec.dims}, self._widths(op, spec)
        weights = contracts()[op].signature.of_kind("Weight")
        return sum(prod(evaluate(d, env) for d in o.dims) * width[o.name] for o in weights if o.name in spec.dtypes)
