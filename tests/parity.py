"""Texts that must not depend on how they are made: prompts, how many tokens follow, and sampling beside other requests."""

from __future__ import annotations

from functools import cache

from porthal.model import Glm5
from porthal.model.generate import generate
from tests.oracles.tiny import PROMPT

NEW = 24
# One and two pages, within and beyond index_topk; the third meets an end-of-text token.
PROMPTS = [PROMPT, PROMPT[:50], PROMPT[:7], PROMPT[30:95]]
DRAFTS = (1, 3, 5)
BATCHES = ((0, 40), (1, None), (3, 40), (5, None))  # drafts, and rows of a prefill's chunk
SAMPLED = (0, 3)  # drafts


@cache
def one_by_one(model: Glm5) -> list[list[int]]:
    return [model.generate(prompt, NEW) for prompt in PROMPTS]


def together(model: Glm5, drafts: int, chunk: int | None) -> list[list[int]]:
    return generate(model, PROMPTS, NEW, speculative=drafts, prefill_chunk=chunk).tokens


def check_sampling(model: Glm5, drafts: int) -> None:
    """Sampled text depends on the seed and the request's index alone."""

    def sampled(prompts: list[list[int]], seed: int = 7, chunk: int | None = None) -> list[list[int]]:
        return generate(model, prompts, 8, temperature=0.9, speculative=drafts, seed=seed, prefill_chunk=chunk).tokens

    whole = sampled(PROMPTS)
    assert sampled(PROMPTS, chunk=40) == whole
    assert sampled(PROMPTS[:1]) == whole[:1]
    assert sampled([PROMPT, PROMPT[:3], PROMPTS[2]])[::2] == whole[:3:2]  # among other requests
    assert sampled(PROMPTS[:1], seed=8) != whole[:1]
    first, second = sampled([PROMPT, PROMPT])
    assert first == whole[0] != second
