"""Generation for a batch of requests of different lengths: greedy, sampled, and speculative with MTP drafts.

One device-to-host copy per step of the main model: the tokens it emitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from porthal.hal import Batch, NotFinite, UsageError
from porthal.model.cache import Request
from porthal.model.sampling import GREEDY, Sampling
from porthal.model.tokens import Array, check_count, check_ids, float_array, ids_array, uniforms
from porthal.ops.check_finite import NOT_FINITE

if TYPE_CHECKING:
    from porthal.model.glm5 import Glm5


@dataclass
class Stream:
    """One request in progress: its prompt's ids, what it emitted, and its pages."""

    index: int
    prompt: list[int]
    pages: Request
    out: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def position(self) -> int:
        """Position of the last token, which is emitted but not cached yet."""
        return len(self.prompt) + len(self.out) - 1


@dataclass(frozen=True)
class Generated:
    """tokens: new ids per request; forwards: steps of the main model, prefill included."""

    tokens: list[list[int]]
    forwards: int


def generate(
    model: Glm5,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float | None = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    speculative: int = 0,
    seed: int = 0,
    prefill_chunk: int | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> Generated:
    """Continue every prompt by up to max_new_tokens, stopping at an end-of-text token or where the context is full.

    Greedy at temperature 0, whatever generation_config.json says; a temperature above 0 draws, as `ops.sample` does, with
    the file's top_p and top_k where they are not given; temperature None takes the file's do_sample and temperature too.
    `speculative` is the number of MTP drafts per step: greedy text does not depend on it, and drawn text has the same
    distribution with it. `on_tokens(request, ids)` is called as tokens come.

    UsageError for an empty or too long prompt, a bad id, or a number out of range; NotClaimed where the binding lacks an op
    that is called; NotFinite, whose `done` is what this would have returned, where logits are NaN or infinite: that ends
    the text of this request alone.
    """
    if prefill_chunk is not None:
        check_count("prefill_chunk", prefill_chunk, 1)
    sampling = model.config.sampling.but(temperature, top_p, top_k)
    return _Run(model, prompts, max_new_tokens, sampling, speculative, seed, on_tokens).run(prefill_chunk)


def step(model: Glm5, requests: Sequence[tuple[int, int]], drafts: int = 0) -> Callable[[], None]:
    """The next step of texts in progress, to be made by what is returned, again and again from the same place: a greedy token
    for each, with MTP drafts if asked; or, where a request has more than one row besides its drafts, a piece of the prompts.
    No token of the model may end a text.

    requests  of each text the rows of the step, and the keys that the last of them sees
    """
    tokens = [n % model.config.vocab_size for n in range(len(requests))]  # which choose experts of their own
    run = _Run(model, [[token] for token in tokens], 4 * (drafts + 1), GREEDY, drafts, 0, None)
    run.cache = model.new_cache([kv for _, kv in requests])
    for stream, (_, kv) in zip(run.streams, requests):
        stream.pages = run.cache.new_request()
        run.cache.step([stream.pages], [kv])

    def back() -> None:
        for stream, (q, kv), token in zip(run.streams, requests, tokens):
            run.cache.truncate(stream.pages, kv - q)
            stream.out = [token]

    back()
    rows = [q for q, _ in requests]
    if drafts:
        run._catch_up(run.streams, [1] * len(rows), model.ops.embedding(run._ints([0] * len(rows)), model.embed))
    tail = run.tail

    def again() -> None:
        back()
        run.tail = tail
        if any(q > drafts + 1 for q in rows):
            run.piece(rows)
        elif drafts:
            run._verify(run.streams)
        else:
            run._decode(run.streams)

    return again


@dataclass(frozen=True)
class Captured:
    """A decode step as a graph: what new values are written over, and what repeats it.

    held  of each stream its index and how many pages it has: there is room in them for what `batch` may become
    """

    held: list[tuple[int, int]]
    batch: Batch
    given: list[Any]
    replay: Callable[[], Any]


@dataclass
class Tail:
    """What the MTP layer knows at the end of each stream: its hidden state [R, H] and the selection to share."""

    streams: list[Stream]
    g: Any
    selection: Any


class _Run:
    def __init__(
        self,
        model: Glm5,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        speculative: int,
        seed: int,
        on_tokens: Callable[[int, list[int]], None] | None,
    ) -> None:
        self.model, self.ops, self.config = model, model.ops, model.config
        self.limit = check_count("max_new_tokens", max_new_tokens, 0)
        self.drafts = check_count("speculative", speculative, 0)
        self.seed = check_count("seed", seed, 0)
        self.sampling = sampling
        if speculative and not model.mtp:
            raise UsageError(f"speculative is {speculative}, but this checkpoint has no MTP layer: use 0")
        first = "sample" if sampling.temperature else "argmax"
        self.captures = self.ops.captures and self.ops.capturable(first)
        self.ops.require("check_finite", first, *(("argmax", "speculative_verify") if self.drafts else ()))
        if not prompts:
            raise UsageError("there is no prompt: give at least one")
        self.context = self.config.max_position_embeddings
        ids = [check_ids(p, self.config.vocab_size, self.context) for p in prompts]
        self.on_tokens = on_tokens or (lambda request, tokens: None)
        longest = [min(len(p) + self.limit + self.drafts, self.context) for p in ids]
        self.cache = model.new_cache(longest)
        self.streams = [
            Stream(i, p, self.cache.new_request(), done=not self.limit or len(p) == self.context)
            for i, p in enumerate(ids)
        ]
        self.forwards = 0
        self.tail = Tail([], None, None)
        self.captured: Captured | None = None
        self.not_finite = ""  # the first request whose logits are not, in words

    def run(self, prefill_chunk: int | None) -> Generated:
        if self._active():
            self._prefill(prefill_chunk)
        while active := self._active():
            # A request near the end of its context has no room for drafts any more.
            drafting = [s for s in active if self.drafts and s.position + self.drafts < self.context]
            if drafting:
                self._verify(drafting)
            if len(drafting) < len(active):
                self._decode([s for s in active if s not in drafting])
        done = Generated([s.out for s in self.streams], self.forwards)
        if self.not_finite:
            raise NotFinite(self.not_finite, done)
        return done

    # -- steps of the main model -------------------------------------------------------------------------------------

    def _prefill(self, chunk: int | None) -> None:
        """All prompts, in chunks of at most `chunk` tokens each, and the first new token of each."""
        streams = self._active()
        longest = max(len(s.prompt) for s in streams)
        chunk = chunk or longest
        ends: dict[int, Any] = {}
        for start in range(0, longest, chunk):
            waiting = [s for s in streams if start < len(s.prompt)]
            waiting.sort(key=lambda s: len(s.prompt) - start > 8)  # pieces of up to 8 rows count as decoding: first
            pieces = [s.prompt[start : start + chunk] for s in waiting]
            batch = self.cache.step([s.pages for s in waiting], [len(p) for p in pieces])
            hidden, batch = self._hidden(self._ints(_joined(pieces)), batch)
            ending = [r for r, s in enumerate(waiting) if start + chunk >= len(s.prompt)]
            if ending:
                last = self.ops.take_rows(hidden, self._ints([int(batch.last_rows[r]) for r in ending]))
                self._emit_next([waiting[r] for r in ending], last)
                ends.update({waiting[r].index: last[i : i + 1] for i, r in enumerate(ending)})
            if self.drafts:
                # Any id does behind a prompt that ends here without a token.
                following = [[*s.prompt, *s.out, 0][start + 1 : start + 1 + len(p)] for s, p in zip(waiting, pieces)]
                self._mtp(_joined(following), hidden, batch, None)
        if self.drafts and (active := self._active()):
            self._catch_up(active, [1] * len(active), self._stack([ends[s.index] for s in active]))

    def _decode(self, active: list[Stream]) -> None:
        """One token for every stream."""
        batch = self.cache.step([s.pages for s in active], [1] * len(active))
        given = [ids_array([s.out[-1] for s in active]), *self._drawn(active)]
        self.forwards += 1
        if self.captures:
            step = self._captured(active, given)
            self.ops.plan(batch, into=step.batch)
            for values, held in zip(given, step.given):
                self.ops.from_numpy(values, into=held)
            tokens = step.replay()
        else:
            tokens = self._next(self.ops.plan(batch), *map(self.ops.from_numpy, given))
        self._emit_all(active, tokens)

    def _captured(self, active: list[Stream], given: list[Array]) -> Captured:
        """The step of these streams as a graph, captured again when they are others, or have another page."""
        held = [(s.index, len(s.pages.pages)) for s in active]
        if self.captured is None or self.captured.held != held:
            room = [pages * self.cache.block_size for _, pages in held]
            batch = self.ops.plan(self.cache.view([s.pages for s in active], [1] * len(active), room))
            inputs = [self.ops.from_numpy(values.copy()) for values in given]
            self.captured = Captured(held, batch, inputs, self.ops.capture(lambda: self._next(batch, *inputs)))
        return self.captured

    def _next(self, batch: Batch, ids: Any, *drawn: Any) -> Any:
        """The token after each of these."""
        return self._chosen(self.model.hidden(ids, batch, self.cache), *drawn)

    def _verify(self, active: list[Stream]) -> None:
        """Draft with the MTP layer, verify all drafts in one forward, keep the accepted prefix and one more token."""
        n, R = self.drafts, len(active)
        before = [s.pages.length for s in active]
        batch = self.cache.step([s.pages for s in active], [n + 1] * R)
        rows = self._ints([s.out[-1] for s in active]).reshape(R, 1)
        for draft in self._draft(active, before):
            rows = self.ops.concat(rows, draft.reshape(R, 1))
        hidden, _ = self._hidden(rows.reshape(R * (n + 1)), batch)
        logits = self.model.logits(hidden)
        tokens = self.ops.speculative_verify(
            logits.reshape(R, n + 1, self.config.vocab_size),
            rows[:, 1:],
            *map(self.ops.from_numpy, (self._uniforms(active, n + 1), *self._settings(R))),
        )
        counts = []
        tokens = self.ops.check_finite(logits, tokens.reshape(R * (n + 1)))
        for s, length, row in zip(active, before, self._on_host(tokens, R)):
            counts.append(sum(token >= 0 for token in row))
            self.cache.truncate(s.pages, length + counts[-1])
            self._emit(s, row)
        self._keep(active, hidden, counts)

    def _hidden(self, ids: Any, batch: Batch) -> tuple[Any, Batch]:
        self.forwards += 1
        planned = self.ops.plan(batch)
        return self.model.hidden(ids, planned, self.cache), planned

    def piece(self, rows: list[int]) -> None:
        """So many rows of every prompt, each of which ends there."""
        hidden, batch = self._hidden(self._ints([0] * sum(rows)), self.cache.step([s.pages for s in self.streams], rows))
        self._emit_next(self.streams, self.ops.take_rows(hidden, self._ints([int(row) for row in batch.last_rows])))

    # -- the MTP layer -----------------------------------------------------------------------------------------------

    def _draft(self, active: list[Stream], lengths: list[int]) -> list[Any]:
        """n ids [R] on the device, from the tail; only the first step runs the indexer where selections are shared."""
        rows = [self.tail.streams.index(s) for s in active]
        g, selection = self.ops.take_rows(self.tail.g, self._ints(rows)), self.tail.selection
        if selection is not None:
            selection = self.ops.select_rows(selection, self._ints(rows))
        drafts = [self.ops.argmax(self.model.logits(g))]
        for step in range(1, self.drafts):
            batch = self.cache.view([s.pages for s in active], [1] * len(active), [n + step for n in lengths])
            g, _ = self._mtp(drafts[-1], g, self.ops.plan(batch), selection)
            drafts.append(self.ops.argmax(self.model.logits(g)))
        return drafts

    def _keep(self, active: list[Stream], hidden: Any, counts: list[int]) -> None:
        """Give the MTP layer the true hidden states of the first counts[r] rows of each stream."""
        going = [(r, s) for r, s in enumerate(active) if not s.done]
        if going:
            rows = [r * (self.drafts + 1) + i for r, _ in going for i in range(counts[r])]
            true = self.ops.take_rows(hidden, self._ints(rows))
            self._catch_up([s for _, s in going], [counts[r] for r, _ in going], true)

    def _catch_up(self, streams: list[Stream], counts: list[int], g: Any) -> None:
        batch = self.ops.plan(self.cache.view([s.pages for s in streams], counts, [s.pages.length for s in streams]))
        following = [token for s, n in zip(streams, counts) for token in s.out[-n:]]
        g, selection = self._mtp(following, g, batch, None)
        last = self._ints([int(row) for row in batch.last_rows])
        shared = self.ops.select_rows(selection, last) if self.config.index_share_for_mtp_iteration else None
        self.tail = Tail(streams, self.ops.take_rows(g, last), shared)

    def _mtp(self, following: Any, g: Any, batch: Batch, selection: Any) -> tuple[Any, Any]:
        ids = self._ints(following) if isinstance(following, list) else following
        mtp = self.model.mtp
        assert mtp is not None  # refused in __init__
        return mtp.hidden(ids, self.model.embed, g, batch, self.cache.layers[-1], selection)

    # -- tokens ------------------------------------------------------------------------------------------------------

    def _emit_next(self, streams: list[Stream], hidden: Any) -> None:
        """Choose the next token of each stream from its last hidden state [R, H]."""
        self._emit_all(streams, self._chosen(hidden, *map(self.ops.from_numpy, self._drawn(streams))))

    def _chosen(self, hidden: Any, *drawn: Any) -> Any:
        """A token for each row of hidden states, NOT_FINITE where its logits are not; `drawn` is what `sample` takes."""
        logits = self.model.logits(hidden)
        return self.ops.check_finite(logits, self.ops.sample(logits, *drawn) if drawn else self.ops.argmax(logits))

    def _drawn(self, streams: list[Stream]) -> list[Array]:
        """What `sample` takes beside the logits; nothing where the text is greedy."""
        if self.sampling.temperature == 0:
            return []
        return [self._uniforms(streams, 1).reshape(len(streams)), *self._settings(len(streams))]

    def _emit_all(self, streams: list[Stream], tokens: Any) -> None:
        for s, row in zip(streams, self._on_host(tokens, len(streams))):
            self._emit(s, row)

    def _on_host(self, tokens: Any, R: int) -> list[list[int]]:
        """A row per stream: the one copy to the host."""
        rows: list[list[int]] = self.ops.to_numpy(tokens).reshape(R, -1).astype(int).tolist()
        return rows

    def _emit(self, stream: Stream, row: list[int]) -> None:
        """Take the tokens of a row, up to its first negative one."""
        fresh: list[int] = []
        for token in row:
            if token == NOT_FINITE:
                self.not_finite = self.not_finite or (
                    f"the logits for position {stream.position + 1} of request {stream.index} are NaN or infinite, after "
                    f"{len(stream.out)} new tokens: look for such numbers in the checkpoint, or let `porthal diff` name the "
                    "op that makes them"
                )
                stream.done = True
                self.cache.release(stream.pages)
            if token < 0:
                break
            fresh.append(token)
            stream.out.append(token)
            full = len(stream.out) == self.limit or stream.position == self.context - 1
            if full or token in self.config.eos_token_id:
                stream.done = True
                self.cache.release(stream.pages)
                break
        self.on_tokens(stream.index, fresh)

    def _active(self) -> list[Stream]:
        return [s for s in self.streams if not s.done]

    # -- host values to the device -----------------------------------------------------------------------------------

    def _ints(self, values: list[int]) -> Any:
        return self.ops.from_numpy(ids_array(values))

    def _settings(self, R: int) -> tuple[Array, Array, Array]:
        """temperature, top_k and top_p of R rows."""
        heat, p, k = self.sampling.temperature, self.sampling.top_p, min(self.sampling.top_k, self.config.vocab_size)
        return float_array([heat] * R), ids_array([k] * R), float_array([p] * R)

    def _uniforms(self, streams: list[Stream], count: int) -> Array:
        return uniforms(self.seed, [s.index for s in streams], [s.position for s in streams], count)

    def _stack(self, rows: list[Any]) -> Any:
        """[R, H] of R rows [1, H]."""
        joined = rows[0]
        for row in rows[1:]:
            joined = self.ops.concat(joined, row)
        return joined.reshape(len(rows), self.config.hidden_size)


def _joined(parts: list[list[int]]) -> list[int]:
    return [token for part in parts for token in part]
