"""Moore Threads' calls carry the demo checkpoint, take what MATE takes, and give way where it is not here."""

import sys
import types

import pytest
import torch

import porthal
from porthal.backends.moore_threads import emulated
from porthal.backends.torch.interfaces.flash_mla import FLASH_MLA
from porthal.backends.torch.interfaces.library import Library
from porthal.conformance import replay
from porthal.hal import CallSpec, contracts, create, probe
from porthal.model.load import DEMO, load
from tests import demo
from tests.adapters import CAPTURED, BadInput, engine_asked_for, missing, unlike_contracts
from tests.launches import assert_the_page_says_how_many
from tests.ranks import assert_the_text_of_two_ranks_is_the_reference_s

OWN = {"add_rms_norm", "grouped_gemm", "indexer_topk", "kv_write", "moe_experts", "rms_norm", "rope", "silu_mul", "sparse_mla"}


@pytest.fixture
def chip():
    return create("moore_threads")


def test_kernels_have_the_signatures_of_their_contracts(chip):
    assert unlike_contracts(type(chip)) == []


def test_every_call_is_in_the_library_and_takes_what_is_passed():
    assert missing("mate", "deep_gemm", "flash_mla", "torch.nn.functional") == {}


def test_own_kernels_serve_the_model_in_bfloat16():
    choices = demo.model("moore_threads", "bfloat16").ops.choices
    assert {op for op, c in choices.items() if c.status == "own"} == OWN  # the demo has 4 experts: a gate has 32 or more
    assert choices["moe_route"].reason.startswith("moore_threads: E = 4, the kernel takes one of 160, 256, 384, or a multiple")
    wide = demo.model("moore_threads", "float32").ops.choices["sparse_mla"]
    assert wide.status == "inherited"
    assert wide.reason.endswith("flash_mla.flash_mla_sparse_fwd: q_latent is float32, the kernel takes one of bfloat16")


def test_the_gate_takes_what_is_compiled_or_small(chip):
    [kernel] = [k for k in chip.candidates(contracts()["moe_route"]) if k.owner == "moore_threads"]

    def refused(E, n_group=1):
        return kernel.refuses(CallSpec({"T": 4, "E": E}, {}, {"k": 8, "n_group": n_group}, {}))

    assert refused(256) is None and refused(96) is None
    assert refused(512) == "E = 512, the kernel takes one of 160, 256, 384, or a multiple of 32 up to 128"
    assert refused(256, 8) == "n_group = 8, the kernel takes one of 1"


def test_another_package_of_the_name_is_told_from_mate(monkeypatch):
    """A package index has a `mate` that matches values in tests."""
    library = Library("mate_of_matchers", proof="mate_of_matchers.deep_gemm", moe_fused_gate="input")
    monkeypatch.setitem(sys.modules, "mate_of_matchers", types.ModuleType("mate_of_matchers"))
    assert library.lacks("moe_fused_gate").startswith("needs the Python module mate_of_matchers.deep_gemm: ")
    del Library.known["mate_of_matchers"]


class TestBadInput(BadInput):
    backend, package, file = "moore_threads", "torch_musa", "mtgpu.0"
    call = FLASH_MLA, "flash_mla_sparse_fwd", "sparse_mla"


def test_it_is_here_and_says_where_it_ran(chip):
    assert probe("moore_threads").state == "available"
    assert (chip.place, chip.describe()) == ("emulated device", "emulated musa")
    facts = chip.device_facts()
    assert (facts["count"](), facts["collectives"]()) == (torch.musa.device_count(), "mccl")


def test_ranks_meet_by_the_vendors_own_engine(chip, monkeypatch):
    assert engine_asked_for(chip, monkeypatch) == "mccl"


@pytest.mark.parametrize("token", CAPTURED)
def test_a_captured_call_follows_what_is_written_over_its_operands(chip, token):
    result = replay(token, chip)
    assert (result.verdict, result.owner) == ("PASS", "moore_threads"), result.message


def test_the_decode_step_is_a_graph_and_its_text_the_same():
    model = load(DEMO, porthal.bind("moore_threads"), dtype="bfloat16")
    assert model.ops.captures and not demo.model("moore_threads", "bfloat16").ops.captures  # which asks for scores
    assert model.generate(demo.PROMPT, 24) == demo.text("moore_threads", "bfloat16", 24)


def test_the_page_says_how_many_operations_a_step_is():
    assert_the_page_says_how_many("moore_threads", "torch:musa:0", emulated.calls)


def test_two_ranks_make_the_text_of_the_reference():
    assert_the_text_of_two_ranks_is_the_reference_s("moore_threads")
