"""`porthal diff`: a model on a backend in lockstep with the reference, and the first op and layer at fault."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porthal.conformance.diff.lockstep import Call, Halt, Lockstep, binding
from porthal.conformance.judgement.saved import save
from porthal.hal import Binding, NotFinite
from porthal.model.generate import generate
from porthal.model.glm5 import Glm5
from porthal.model.load import DEMO, fit, opened

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA = 2  # of the JSON
TEXT = """def longest(words):
    best = ""
    for word in words:
        if len(word) > len(best):
            best = word
    return best
"""
DRAFTED = 16  # tokens of the prompt that the second run, with drafts, begins with


def lockstep(
    theirs: Binding,
    tokens: Sequence[int],
    model: str | Path = DEMO,
    dtype: str = "float32",
    decode: int = 4,
    caches: Sequence[str] = (),
) -> Difference:
    """Prefill `tokens` and decode `decode` steps on the binding and the reference; then draft if there is an MTP layer.

    Both continue with the reference's tokens, whatever the backend would choose. Local results are judged at the level
    "bring-up". Raises UsageError for a directory without a model, and for tokens that are missing, too many or bad.
    """
    config, source = opened(model, caches)
    config = replace(config, eos_token_id=())  # an end of text does not end the comparison
    fitted, kept = fit(config, source, theirs, dtype, drafts=2 if config.has_mtp else 0)
    both = Lockstep(fitted)
    loaded = Glm5(config, source, binding(both), dtype, kept=kept)
    _label(loaded, both)
    halted, stopped = False, ""
    try:
        generate(loaded, [tokens], decode + 1)
        if loaded.mtp:
            generate(loaded, [tokens[:DRAFTED]], 3, speculative=2)
    except Halt:
        halted = True
    except NotFinite as error:
        stopped = f"The reference itself stopped: {error}."
    return Difference(str(theirs.backend), theirs.backend.place, dtype, len(tokens), decode, both.calls, halted, stopped)


class Block:
    """A block of the model that reports to the lockstep when it runs."""

    def __init__(self, block: Any, lockstep: Lockstep, layer: str) -> None:
        self._block, self._lockstep, self._layer = block, lockstep, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, *args: Any) -> Any:
        with self._lockstep.inside(self._layer):
            return self._block(*args)


def _label(model: Any, lockstep: Lockstep) -> None:
    """Let a model's parts say which of them runs: input, layers, MTP; everything else belongs to the head."""

    def step(layer: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with lockstep.stepping(), lockstep.inside(layer):
                return function(*args)

        return call

    model.hidden = step("input", model.hidden)
    model.blocks = [Block(b, lockstep, f"layer {i}") for i, b in enumerate(model.blocks)]
    if model.mtp:
        model.mtp.hidden = step("mtp", model.mtp.hidden)


# -- what was found --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer's line of the report, over all steps."""

    name: str
    calls: Sequence[Call]

    @property
    def worst(self) -> Call:
        """The call at fault, else the one nearest to its budget."""
        return max(self.calls, key=lambda c: (bool(c.fault), c.worst))

    @property
    def accumulated(self) -> float:
        """The relative error that leaves the layer, in the worst step."""
        last = {c.step: c.accumulated for c in self.calls if c.accumulated is not None}
        return max(last.values(), default=0.0)

    @property
    def honest(self) -> int:
        return sum(c.honest for c in self.calls)

    @property
    def wrong(self) -> int:
        return sum(c.wrong for c in self.calls)


@dataclass(frozen=True)
class Difference:
    """A run in lockstep: every call, and the verdict over them; whether it `halted` where nothing could be continued with."""

    backend: str
    place: str
    dtype: str
    tokens: int
    decode: int
    calls: Sequence[Call]
    halted: bool = False
    stopped: str = ""

    @cached_property
    def at_fault(self) -> Call | None:
        """The first call at fault, in the order of execution."""
        return next((c for c in self.calls if c.fault), None)

    @cached_property
    def first_flip(self) -> Call | None:
        """The first call whose discrete choice the free run makes differently."""
        return next((c for c in self.calls if c.honest or c.wrong), None)

    @cached_property
    def layers(self) -> list[Layer]:
        names = dict.fromkeys(c.layer for c in self.calls)
        order = sorted(names, key=lambda n: n in ("head", "mtp"))  # they run between others, so they come last
        return [Layer(n, [c for c in self.calls if c.layer == n]) for n in order]

    @property
    def exit_code(self) -> int:
        return 1 if self.at_fault or self.stopped else 0

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        if self.at_fault is None:
            within = f"No op exceeds its error budget: {len(self.calls)} calls on {self.backend} in {self.dtype}."
            return f"{within} {self.stopped}".rstrip()
        return f"{self.at_fault.label} is the first at fault, in step {self.at_fault.step}: {self.at_fault.fault}."

    @property
    def flips(self) -> str:
        """The free run's choices in words, as far as it went."""
        if self.halted:
            last = self.calls[-1]
            return f"The run ended in {last.label}, step {last.step}: nothing was compared after it."
        if self.first_flip is None:
            return "Running freely, the backend makes every discrete choice as the reference does."
        first, honest, wrong = self.first_flip, sum(x.honest for x in self.layers), sum(x.wrong for x in self.layers)
        return (
            f"Running freely, the backend first chooses differently in {first.label}, step {first.step}; rows that do: "
            f"{honest} within the error of their scores (honest), {wrong} wrong."
        )

    def table(self) -> Group:
        """The report for rich: a line per layer, then the verdict."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        title = f"{self.backend} ({self.place}) in lockstep with the reference, {self.dtype}"
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("layer", no_wrap=True)
        table.add_column("worst op", overflow="fold")
        for name in ("local |e|/B", "accumulated", "honest flips", "wrong flips"):
            table.add_column(name, justify="right")
        table.add_column("verdict")
        for layer in self.layers:
            worst = layer.worst
            measured = f"{worst.worst:.3g}" if worst.worst or not worst.fault else "-"  # some faults have no size
            figures = measured, f"{layer.accumulated:.2e}", str(layer.honest), str(layer.wrong)
            verdict = Text("at fault", "red") if worst.fault else Text("within budget", "green")
            table.add_row(layer.name, " / ".join(worst.place[1:]), *figures, verdict)
        head = Text(f"{title}: {self.tokens} tokens, then {self.decode} steps")
        return Group(head, table, Text(self.sentence), Text(self.flips))

    def json(self) -> str:
        """The report as JSON; an error that is not finite is null."""
        facts = {
            "schema": SCHEMA,
            "backend": self.backend,
            "place": self.place,
            "dtype": self.dtype,
            "tokens": self.tokens,
            "decode": self.decode,
            "halted": self.halted,
            "sentence": self.sentence,
            "at_fault": self.at_fault and _facts(self.at_fault),
            "first_flip": self.first_flip and _facts(self.first_flip),
            "layers": [
                {
                    "layer": layer.name,
                    "worst": _facts(layer.worst),
                    "accumulated": _finite(layer.accumulated),
                    "honest": layer.honest,
                    "wrong": layer.wrong,
                }
                for layer in self.layers
            ],
            "faults": [_facts(c) for c in self.calls if c.fault],
        }
        return json.dumps(facts, indent=1, allow_nan=False)

    def save(self, directory: Path) -> Path | None:
        """Write the first call at fault, to be measured and judged again; returns the path of its .npz."""
        call = self.at_fault
        if call is None or call.inputs is None:
            return None
        name = "-".join(call.place).replace(" ", "")
        inputs = replace(call.inputs, origin=call.label)
        where = self.backend + f" ({self.place})" * (self.place != "hardware")
        return save(inputs, call.returned, directory, name, where)


def _facts(call: Call) -> dict[str, Any]:
    return {
        "layer": call.layer,
        "op": call.op,
        "place": list(call.place),
        "step": call.step,
        "worst": _finite(call.worst),
        "at": call.at,
        "accumulated": _finite(call.accumulated),
        "honest": call.honest,
        "wrong": call.wrong,
        "fault": call.fault,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
