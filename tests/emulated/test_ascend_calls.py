"""How the adapter calls torch_npu: by keyword alone, and only what the schemas of this torch_npu have."""

import ast
import inspect
import types
from pathlib import Path

import pytest
import torch

import porthal
from porthal.backends.ascend import emulated
from porthal.hal import PagesSpec, Unavailable, bind, create, running

emulated.install()  # before what imports torch_npu
from porthal.backends.ascend import attention, experts, prolog, rows  # noqa: E402
from porthal.backends.ascend.calls import Call  # noqa: E402

FAMILIES = (attention, experts, prolog, rows)
CALLS = {name: call for family in FAMILIES for name, call in vars(family).items() if isinstance(call, Call)}


def made(family):
    """(name, positional arguments, keywords) of each place where a Call is called."""
    for node in ast.walk(ast.parse(Path(inspect.getfile(family)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.func.id, node.args, [k.arg for k in node.keywords]


def test_every_call_names_all_its_arguments_and_no_others():
    seen = [call for family in FAMILIES for call in made(family)]
    assert {name for name, _, _ in seen} == set(CALLS)
    for name, positional, keywords in seen:
        assert positional == [] and set(keywords) == CALLS[name].arguments, name


def test_no_call_goes_past_the_list():
    for family in FAMILIES:
        assert "torch_npu" not in vars(family) and "torch.ops" not in inspect.getsource(family)


def test_what_this_torch_npu_lacks_is_told_in_one_sentence():
    version = "this torch_npu (2.13.0+emulated)"
    assert Call("npu_rms_norm", "input", "gamma").missing() is None  # epsilon has a default
    assert Call("npu_x", "input").missing() == f"{version} has no npu_x: install one for CANN 8.5 or later"
    written = "the adapter is written for the schema of torch-npu 2.13"
    assert Call("npu_rms_norm", "input", "gamma", "eps").missing() == f"npu_rms_norm of {version} takes no eps: {written}"
    assert Call("npu_rms_norm", "input").missing() == f"npu_rms_norm of {version} asks for more arguments: {written}"


def test_a_torch_npu_without_sparse_attention_runs_it_on_the_base(monkeypatch):
    """2.7.1 has neither op of DSA; all others of the adapter are there."""
    old = types.SimpleNamespace(**{n: getattr(torch.ops.npu, n) for n in dir(torch.ops.npu) if n.startswith("npu_")})
    for name in ("npu_lightning_indexer", "npu_sparse_flash_attention"):
        delattr(old, name)
    monkeypatch.setattr(torch.ops, "npu", old)
    profile = porthal.model.profile(porthal.model.Config.read(porthal.model.DEMO), "bfloat16")
    choices = bind("ascend", profile=profile).choices
    assert choices["rms_norm"].status == "own" and choices["sparse_mla"].status == "inherited"
    why = "has no npu_sparse_flash_attention: install one for CANN 8.5 or later"
    assert choices["sparse_mla"].reason == f"ascend: this torch_npu (2.13.0+emulated) {why}"


@pytest.mark.parametrize("device", ["1", "-1", "cpu"])
def test_a_device_that_is_not_there(device, monkeypatch):
    with pytest.raises(Unavailable, match=f"^ascend has no device {device!r}: torch_npu sees 1, numbered from 0$"):
        create(f"ascend:{device}")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4")
    with pytest.raises(Unavailable, match=r"numbered from 0, which ASCEND_RT_VISIBLE_DEVICES=4 shows$"):
        create(f"ascend:{device}")


def test_memory_that_is_used_up_is_told_in_one_sentence():
    backend = create("ascend")
    torch.npu.set_per_process_memory_fraction(1e-9)
    try:
        told = r"^running on ascend:0 of porthal\.backends\.ascend failed: .*out of memory"
        with pytest.raises(Unavailable, match=told), running(backend):
            backend.alloc_pages(PagesSpec((("c", 512),), "bfloat16", 1024, 64))
    finally:
        torch.npu.set_per_process_memory_fraction(1.0)


def test_a_chip_without_a_stream_for_another_graph_says_so(monkeypatch):
    def graph(npu_graph):
        raise RuntimeError("stream create failed, error code is 207008[Insufficient_Stream_Resources]")

    monkeypatch.setattr(torch.npu, "graph", graph)
    with pytest.raises(Unavailable, match=r"^ascend:0 has no stream left for another graph \(error 207008\): capture fewer$"):
        create("ascend").capture(lambda: None)


def test_a_report_names_the_device_and_the_package():
    assert create("ascend").describe() == "emulated npu, torch_npu 2.13.0+emulated"
