"""Kunlunxin's calls carry the demo checkpoint; it is told from CUDA, whose name it bears, and says that it is emulated."""

import sys
import types

import pytest
import torch

from porthal.backends.kunlunxin import emulated
from porthal.backends.kunlunxin.calls import OPS
from porthal.hal import create, probe
from tests import demo
from tests.adapters import BadInput, missing, unlike_contracts
from tests.launches import assert_the_page_says_how_many

OWN = {"add_rms_norm", "kv_write", "layer_norm", "moe_experts", "moe_route", "rms_norm", "rope", "silu_mul", "sparse_mla"}


@pytest.fixture
def chip():
    return create("kunlunxin")


def test_kernels_have_the_signatures_of_their_contracts(chip):
    assert unlike_contracts(type(chip)) == []


def test_every_call_is_in_the_library_and_takes_what_is_passed():
    assert missing("kunlun_ops", "xspeedgate_ops") == {}


def test_own_kernels_serve_the_model_in_bfloat16():
    choices = demo.model("kunlunxin", "bfloat16").ops.choices
    assert {op for op, c in choices.items() if c.status == "own"} == OWN


def test_it_says_that_it_is_emulated(chip):
    assert (chip.place, chip.describe()) == ("emulated device", "emulated Kunlunxin, its modules on the CPU")
    assert probe("kunlunxin").state == "available"


def test_without_its_layer_it_is_not_here(monkeypatch):
    monkeypatch.setenv("DISABLE_XPYTORCH", "1")
    assert probe("kunlunxin").why == "DISABLE_XPYTORCH is set, which leaves PyTorch without the chip: unset it"


def test_a_layer_that_sees_no_chip_is_not_here(monkeypatch):
    """PyTorch's own word for it is not asked: torch.cuda answers for whatever bears that name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys.modules["torch_xmlir"], "xpu", types.SimpleNamespace(device_count=lambda: 0))
    assert probe("kunlunxin").why == "torch_xmlir sees no device"


def test_the_page_says_how_many_operations_a_step_is():
    assert_the_page_says_how_many("kunlunxin", "torch", emulated.calls)


class TestBadInput(BadInput):
    """Tensors are the CPU's, whose memory is not counted."""

    backend, package, file = "kunlunxin", "torch_xmlir", "xpu0"
    call = OPS, "fwd_kvcache_mla", "sparse_mla"
    pages = 2**40
