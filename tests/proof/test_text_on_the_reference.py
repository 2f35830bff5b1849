"""On the reference backend too, text depends on no way of making it: drafts, batches, chunks, other requests."""

import pytest

from porthal.model import Glm5
from tests.parity import BATCHES, DRAFTS, NEW, PROMPTS, SAMPLED, check_sampling, one_by_one, together

PROVES = ("hal", "ops", "model", "backends/reference", "tests/parity.py", "tests/oracles")


@pytest.mark.parametrize("drafts", DRAFTS)
def test_speculative_text_equals_greedy_text(model: Glm5, drafts: int) -> None:
    assert model.generate(PROMPTS[0], NEW, speculative=drafts) == one_by_one(model)[0]


@pytest.mark.parametrize("way", BATCHES)
def test_batches_and_chunks_do_not_change_the_text(model: Glm5, way: tuple[int, int | None]) -> None:
    assert together(model, *way) == one_by_one(model)


@pytest.mark.parametrize("drafts", SAMPLED)
def test_sampled_text_depends_on_seed_and_index_alone(model: Glm5, drafts: int) -> None:
    check_sampling(model, drafts)
