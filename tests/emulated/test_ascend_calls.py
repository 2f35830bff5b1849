"""How the adapter calls torch_npu: by keyword alone, and only what the schemas of this torch_npu have."""

import ast
import inspect
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import porthal
from porthal.backends.ascend import emulated
from porthal.hal import Unavailable, bind, contracts, create
from tests.adapters import BadInput

torch_npu = emulated.install()  # before what imports it
from porthal.backends.ascend import attention, experts, int8, int8_caches, prolog, rows  # noqa: E402
from porthal.backends.ascend.calls import NPU  # noqa: E402
from porthal.backends.torch.interfaces.library import Library, lacks  # noqa: E402

FAMILIES = (attention, experts, int8, int8_caches, prolog, rows)


def made(family):
    """(name, positional arguments, keywords) of each place where an op of torch_npu is called."""
    for node in ast.walk(ast.parse(Path(inspect.getfile(family)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and re.fullmatch(r"NPU\.\w+", ast.unparse(node.func)):
            yield node.func.attr, node.args, {k.arg for k in node.keywords}


def test_every_call_names_its_arguments_and_what_is_listed_is_what_is_passed():
    seen = [call for family in FAMILIES for call in made(family)]
    assert all(positional == [] for _, positional, _ in seen)
    passed = {name: set().union(*(keywords for n, _, keywords in seen if n == name)) for name, _, _ in seen}
    assert passed == {name: set(arguments) for name, arguments in NPU.calls.items()}


def test_no_call_goes_past_the_list():
    for family in FAMILIES:
        assert "torch_npu" not in vars(family) and "torch.ops" not in inspect.getsource(family)


def test_each_kernel_names_all_that_it_calls():
    known = {f"torch_npu.{name}" for name in NPU.calls}
    kernels = [k for op in contracts().values() for k in create("ascend").candidates(op) if k.owner == "ascend"]
    named = {part if "." in part else f"torch_npu.{part}" for k in kernels for part in k.provider.split("+")}
    assert len(kernels) >= 11 and named == known


def test_what_this_torch_npu_lacks_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setattr(Library, "known", {})
    written, this = "kernels are written for torch-npu 2.13", "this torch_npu 2.13.0+emulated"

    def why(name, arguments):
        return Library("torch_npu", wanted="torch-npu 2.13", **{name: arguments}).lacks(name)

    assert why("npu_rms_norm", "input gamma") is None  # epsilon has a default
    assert why("npu_x", "input") == f"{this} has no npu_x: {written}"
    assert why("npu_rms_norm", "input gamma eps") == f"npu_rms_norm of {this} takes no argument 'eps': {written}"
    missing = f"npu_rms_norm of {this} wants an argument 'gamma', which kernels do not pass: {written}"
    assert why("npu_rms_norm", "input") == missing


def test_of_an_op_with_several_overloads_any_will_do(monkeypatch):
    """Post releases of one version differ so."""
    monkeypatch.setattr(Library, "known", {})
    monkeypatch.setitem(sys.modules, "aten", types.ModuleType("aten"))
    assert Library("aten", sum="self dim keepdim").lacks("sum") is None  # not of the first, which sums all
    assert Library("aten", sum="self axis").lacks("sum") == "sum of this aten takes no argument 'axis'"


def test_every_function_of_a_provider_is_looked_at(monkeypatch):
    monkeypatch.setattr(Library, "known", {})
    one, other = types.ModuleType("one"), types.ModuleType("other")
    one.first = other.second = lambda x: x
    monkeypatch.setitem(sys.modules, "one", one)
    monkeypatch.setitem(sys.modules, "other", other)
    Library("one", first="x", second="x")
    Library("other", first="x", second="x y")
    assert lacks("one.first") is lacks("one.first+unknown.second") is None
    assert lacks("one.first+second") == "this one has no second"
    assert lacks("one.first+other.second+first") == "second of this other takes no argument 'y'"


def test_a_torch_npu_without_sparse_attention_runs_it_on_the_base(monkeypatch):
    """2.7.1 has neither op of DSA; all others of the adapter are there."""
    for name in ("npu_lightning_indexer", "npu_sparse_flash_attention"):
        monkeypatch.delattr(torch_npu, name)
    profile = porthal.model.profile(porthal.model.Config.read(porthal.model.DEMO), "bfloat16")
    choices = bind("ascend", profile=profile).choices
    assert choices["rms_norm"].status == "own" and choices["sparse_mla"].status == "inherited"
    why = "has no npu_sparse_flash_attention: kernels are written for torch-npu 2.13, for CANN 8.5 or later"
    name = "torch_npu.npu_sparse_flash_attention"
    assert choices["sparse_mla"].reason.startswith(f"{name}: this torch_npu 2.13.0+emulated {why}; ")


class TestBadInput(BadInput):
    backend, package, file = "ascend", "torch_npu", "davinci0"
    call = NPU, "npu_sparse_flash_attention", "sparse_mla"


def test_a_chip_without_a_stream_for_another_graph_says_so(monkeypatch):
    def graph(npu_graph):
        raise RuntimeError("stream create failed, error code is 207008[Insufficient_Stream_Resources]")

    monkeypatch.setattr(torch.npu, "graph", graph)
    with pytest.raises(Unavailable, match=r"^ascend:0 has no stream left for another graph \(error 207008\): capture fewer$"):
        create("ascend").capture(lambda: None)


def test_a_report_names_the_device_and_the_package():
    assert create("ascend").describe() == "emulated npu, torch_npu 2.13.0+emulated"
