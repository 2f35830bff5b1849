"""Cambricon's calls carry the demo checkpoint; its selections are slots, and come back as positions."""


import numpy as np
import pytest
import torch

import porthal
from porthal.backends.cambricon import emulated
from porthal.backends.cambricon.calls import TMO
from porthal.backends.torch.backend import Torch
from porthal.backends.torch.interfaces.slots import Slots
from porthal.conformance import replay
from porthal.hal import Batch, PagesSpec, create, probe
from porthal.model.load import DEMO, load
from tests import demo
from tests.adapters import CAPTURED, BadInput, engine_asked_for, missing, unlike_contracts
from tests.launches import assert_the_page_says_how_many
from tests.ranks import assert_the_text_of_two_ranks_is_the_reference_s

OWN = {
    "add_rms_norm", "grouped_gemm", "indexer_topk", "kv_write", "layer_norm", "moe_experts", "moe_route", "moe_unpermute",
    "rms_norm", "rope", "select_rows", "silu_mul", "sparse_mla",
}  # fmt: skip
BATCH = Batch.build([1, 3, 2], [130, 70, 0], [[3, 1, 4], [0, 5], []], 64)  # the last is padding


@pytest.fixture
def chip():
    return create("cambricon")


def test_kernels_have_the_signatures_of_their_contracts(chip):
    assert unlike_contracts(type(chip)) == []


def test_every_call_is_in_the_library_and_takes_what_is_passed():
    assert missing("torch_mlu_ops") == {}


def test_own_kernels_serve_the_model():
    choices = demo.model("cambricon", "bfloat16").ops.choices
    assert {op for op, c in choices.items() if c.status == "own"} == OWN
    choices = demo.model("cambricon", "float32").ops.choices
    assert {op for op, c in choices.items() if c.status == "own"} == OWN - {"indexer_topk"}


def chosen(chip, k=16):
    """The chip's selection, and the base's of the same."""
    rng = np.random.default_rng(0)
    iq, w = (rng.standard_normal(s).astype(np.float32) for s in ((BATCH.T, 32, 128), (BATCH.T, 32)))
    spec = PagesSpec((("k", 128),), "bfloat16", 6, 64)
    keys = chip.alloc_pages(spec)
    keys["k"].copy_(torch.from_numpy(rng.standard_normal((spec.slots, 128)).astype(np.float32)).to(torch.bfloat16))
    batch = chip.plan(BATCH)
    half = [chip.from_numpy(x).to(torch.bfloat16) for x in (iq, w)]
    return [f(chip, *half, keys, batch, k=k, scale=0.1) for f in (type(chip).indexer_topk, Torch.indexer_topk)]


def test_slots_come_back_as_the_positions_of_their_requests(chip):
    """Behind the length of a row stands what memory held; a padded row selects nothing."""
    mine, theirs = chosen(chip)
    assert isinstance(mine.native, Slots)
    rows, wanted = chip.to_logical(mine), chip.to_logical(theirs)
    assert rows["length"].tolist() == [16, 16, 16, 16, 0, 0]
    for a, b in zip(rows["indices"], wanted["indices"]):
        assert sorted(a) == sorted(b)


def test_picked_rows_of_slots_stay_slots(chip):
    mine, _ = chosen(chip)
    picked = chip.select_rows(mine, chip.from_numpy(np.array([3, 0], np.int32)))
    assert isinstance(picked.native, Slots)
    assert np.array_equal(chip.to_logical(picked)["indices"], chip.to_logical(mine)["indices"][[3, 0]])


class TestBadInput(BadInput):
    backend, package, file = "cambricon", "torch_mlu", "cambricon_dev0"
    call = TMO, "single_query_cached_kv_attn", "sparse_mla"


def test_it_is_here_and_says_where_it_ran(chip):
    assert probe("cambricon").state == "available"
    assert (chip.place, chip.describe()) == ("emulated device", "emulated mlu")
    assert chip.device_facts()["collectives"]() == "cncl"


def test_ranks_meet_by_the_vendors_own_engine(chip, monkeypatch):
    assert engine_asked_for(chip, monkeypatch) == "cncl"


@pytest.mark.parametrize("token", CAPTURED)
def test_a_captured_call_follows_what_is_written_over_its_operands(chip, token):
    result = replay(token, chip)
    assert (result.verdict, result.owner) == ("PASS", "cambricon"), result.message


def test_the_decode_step_is_a_graph_and_its_text_the_same():
    model = load(DEMO, porthal.bind("cambricon"), dtype="bfloat16")
    assert model.ops.captures and not demo.model("cambricon", "bfloat16").ops.captures  # which asks for scores
    assert model.generate(demo.PROMPT, 24) == demo.text("cambricon", "bfloat16", 24)


def test_the_page_says_how_many_operations_a_step_is():
    assert_the_page_says_how_many("cambricon", "torch:mlu:0", emulated.calls)


def test_a_plan_holds_nothing_of_rows_times_pages(chip):
    """Which the indexer alone needs: of a long prompt in small pages it is gigabytes."""
    plan = chip.plan(Batch.build([4096], [4096], [range(4096)], 1)).native
    assert sum(x.numel() for x in (*plan, *vars(plan).values()) if isinstance(x, torch.Tensor)) < 20 * 4096


def test_two_ranks_make_the_text_of_the_reference():
    assert_the_text_of_two_ranks_is_the_reference_s("cambricon")
