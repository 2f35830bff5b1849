"""A whole decode step captured as a graph, and replayed token by token beside the same step called each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from porthal.hal import UNIT_ROUNDOFF, Binding, PorthalError, called
from porthal.hal.errors import message_of
from porthal.model.glm5 import Glm5
from porthal.model.load import DEMO, fit, needed, opened
from porthal.model.tokens import ids_array

PERMITTED = 64  # units of rounding of the dtype, beside the largest logit


@dataclass(frozen=True)
class Replays:
    """How far the logits of each replay are from those of the step, relative to the largest; or why there are none."""

    dtype: str
    errors: tuple[float, ...] = ()
    left_out: str = ""
    raised: str = ""

    @property
    def wrong(self) -> int | None:
        """The first replay that is too far off, counted from 0."""
        most = PERMITTED * UNIT_ROUNDOFF[self.dtype]
        return next((n for n, error in enumerate(self.errors) if not error <= most), None)

    @property
    def ok(self) -> bool:
        return not self.raised and self.wrong is None

    @property
    def sentence(self) -> str:
        if self.left_out or self.raised:
            return f"The decode step was not captured: {self.left_out or self.raised}."
        if self.wrong is not None:
            return f"Captured once, the decode step is wrong in replay {self.wrong}: off by {self.errors[self.wrong]:.2g}."
        return f"Captured once, the decode step is right in {len(self.errors)} replays, off by {max(self.errors):.2g} at most."


def replays(
    theirs: Binding,
    tokens: Sequence[int],
    model: str | Path = DEMO,
    dtype: str = "float32",
    decode: int = 4,
    caches: Sequence[str] = (),
) -> Replays:
    """Decode `decode` tokens in requests of several lengths, of which the last is padding in the first half of the steps.

    Every step is called with a batch of its own, and replayed with that batch written over the one of the capture. Both
    continue with the tokens of the call.
    """
    if not theirs.backend.captures:
        return Replays(dtype, left_out=f"{theirs.backend} captures no graphs")
    config, source = opened(model, caches)
    callers = needed(config)
    ops, kept = fit(config, source, theirs, dtype)
    if fixed := [op for op in called(ops.choices, callers) if not ops.capturable(op)]:
        return Replays(dtype, left_out=f"{', '.join(fixed)} of {theirs.backend} cannot be")
    try:
        return Replays(dtype, _errors(Glm5(config, source, ops, dtype, kept=kept), tokens, decode))
    except PorthalError as error:
        return Replays(dtype, raised=message_of(error))


def _errors(model: Glm5, tokens: Sequence[int], decode: int) -> tuple[float, ...]:
    ops = model.ops
    prompts = [tokens[: max(1, len(tokens) * part // 4)] for part in (4, 1, 3)]
    longest = [len(prompt) + decode for prompt in prompts]
    caches = [model.new_cache(longest) for _ in range(2)]
    requests = [[cache.new_request() for _ in prompts] for cache in caches]
    following = [0] * len(prompts)
    for cache, held in zip(caches, requests):
        for r, (request, prompt) in enumerate(zip(held, prompts)):
            batch = ops.plan(cache.step([request], [len(prompt)]))
            logits = ops.to_numpy(model.logits(model.hidden(ops.from_numpy(ids_array(prompt)), batch, cache)))
            following[r] = int(logits[-1].argmax())
    called, replayed = caches
    replayed.step(requests[1], [decode] * len(prompts))  # takes the pages
    planned = ops.plan(replayed.view(requests[1], [1] * len(prompts), longest))
    for request, prompt in zip(requests[1], prompts):
        replayed.truncate(request, len(prompt))
    ids = ops.from_numpy(ids_array(following))
    replay = ops.capture(lambda: model.logits(model.hidden(ids, planned, replayed)))
    errors = []
    for n in range(decode):
        active = len(prompts) - (n < decode // 2)
        step = called.step(requests[0][:active], [1] * active)
        new = ops.from_numpy(ids_array(following[:active]))
        wanted = ops.to_numpy(model.logits(model.hidden(new, ops.plan(step), called)))
        ops.plan(replayed.step(requests[1][:active], [1] * active), into=planned)
        ops.from_numpy(ids_array(following), into=ids)
        found = ops.to_numpy(replay())[:active]
        errors.append(float(np.abs(found - wanted).max() / np.abs(wanted).max()))
        following[:active] = wanted.argmax(-1).tolist()
    return tuple(errors)
