"""An emulated device behaves like a device: own label, shared storage of views, no silent mixing, counted copies."""

import copy
import types

import pytest
import torch

from porthal.backends.torch import collectives
from porthal.backends.torch.emulation import device
from porthal.backends.torch.emulation.device import copies
from porthal.backends.torch.emulation.runtime import visible
from porthal.hal import NotClaimed, create
from tests.ranks import assert_the_text_of_two_ranks_is_the_reference_s
from tests.vendors import two_devices


def test_a_tensor_is_plain_and_says_npu():
    x = torch.arange(6, dtype=torch.bfloat16).npu()
    assert type(x) is torch.Tensor and x.is_npu and x.device == torch.device("npu", 0)
    assert torch.npu.get_device_name() == "emulated npu"
    assert torch.accelerator.current_accelerator() == torch.device("npu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.bool,
                                   torch.float8_e4m3fn])
def test_values_survive_the_round_trip(dtype):
    x = torch.randint(0, 2, (3, 5)).to(dtype)
    assert torch.equal(x.npu().cpu().view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("compute", [
    lambda a, b: a @ b.T,
    lambda a, b: a[1:, ::2] * 3,
    lambda a, b: torch.softmax(a, -1),
    lambda a, b: torch.cat([a, b]),
    lambda a, b: torch.where(a > 0, a, b),
    lambda a, b: torch.nn.functional.rms_norm(a, (8,), b[0]),
    lambda a, b: a.topk(3).values,
    lambda a, b: a.sort().indices,
    lambda a, b: a.to(torch.float32),
    lambda a, b: torch.einsum("ij,kj->ik", a, b),
    lambda a, b: torch.bmm(a[None], b.T[None]),
    lambda a, b: torch.zeros_like(a).index_add_(0, torch.tensor([1, 0], device=a.device), b[:2]),
    lambda a, b: a.unflatten(1, (2, 4)).transpose(0, 1).contiguous(),
    lambda a, b: torch.gather(a, 1, b.long().abs() % 8),
    lambda a, b: torch.split(a, 3)[1].cumsum(0),
])
def test_operators_give_the_cpu_s_bits(compute):
    a, b = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    result = compute(a.npu(), b.npu())
    assert result.device.type == "npu"
    assert torch.equal(result.cpu(), compute(a, b))


def test_views_share_storage_and_in_place_returns_the_same_tensor():
    x = torch.zeros(4, 4, device="npu")
    view = x[1:3].t()
    assert view.add_(1) is view
    assert x.cpu().sum() == 8 and view._base is x
    out = torch.empty(0, device="npu")
    assert torch.add(x, 1, out=out) is out and out.cpu().sum() == 24


def test_resize_deepcopy_and_autograd():
    x = torch.arange(4.0, device="npu")
    x.resize_(6)
    assert x.shape == (6,) and x[:4].tolist() == [0, 1, 2, 3]
    twin = copy.deepcopy(x)
    twin.zero_()
    assert x[3].item() == 3
    w = torch.tensor([2.0, 3.0], device="npu", requires_grad=True)
    (w * w).sum().backward()
    assert w.grad.is_npu and w.grad.tolist() == [4, 6]


def test_a_lazy_conjugate_copies_as_its_value():
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(z.npu().conj().cpu(), z.conj().resolve_conj())


@pytest.mark.parametrize("mix", [
    lambda host, dev: dev + host, lambda host, dev: torch.mm(dev, host), lambda host, dev: torch.cat([dev, host]),
    lambda host, dev: dev.index_select(0, torch.tensor([0])), lambda host, dev: torch.add(host, host, out=dev),
    lambda host, dev: torch.ops.aten.index_put_(dev, [torch.tensor([0, 1])], host),
])
def test_mixing_devices_is_refused(mix):
    host = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="same device"):
        mix(host, host.npu())


def test_host_scalars_and_host_indices_are_allowed():
    x = torch.arange(4.0, device="npu")
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    copies.reset()
    assert x[torch.tensor([3, 0])].tolist() == [3, 0]
    assert (copies.to_device, copies.to_host) == (1, 1)


@pytest.mark.parametrize(("read", "count"), [
    (lambda x: x.cpu(), 1),
    (lambda x: x.to("cpu", torch.float32), 1),
    (lambda x: torch.zeros(4).copy_(x), 1),
    (lambda x: x.tolist(), 1),
    (lambda x: x.sum().item(), 1),
    (lambda x: bool(x.any()), 1),
    (lambda x: torch.equal(x, x), 1),
    (lambda x: x.nonzero(), 1),
    (lambda x: x[x > 0], 1),
    (lambda x: x[x.argsort()], 0),
    (lambda x: x.argmax(), 0),
    (lambda x: x.clone().float(), 0),
    (lambda x: torch.softmax(x, 0), 0),
])
def test_reads_by_the_host_are_counted(read, count):
    x = torch.tensor([1.0, -2.0, 3.0, 0.0]).npu()
    assert (copies.to_device, copies.to_host) == (1, 0)
    read(x)
    assert (copies.to_device, copies.to_host) == (1, count)


def test_factories_do_not_copy():
    for make in (torch.zeros, torch.empty, torch.randn):
        make(3, 4, device="npu", dtype=torch.bfloat16)
    torch.arange(5, device="npu")
    assert (copies.to_device, copies.to_host) == (0, 0)


def test_a_second_vendor_and_a_missing_ordinal_are_refused():
    with pytest.raises(RuntimeError, match=r"cannot emulate 1 device.* of 'musa': this process already has .*'npu'"):
        device.install("musa")
    with pytest.raises(RuntimeError, match="ordinal 1 does not exist"):
        torch.empty(2, device="npu:1")
    assert device.install("npu") is torch.npu


def test_another_vendor_has_several_ordinals():
    """Musa, and ranks that each take one; tests/proof has the others."""
    assert two_devices("musa") == ("refused\n", "")


def test_more_ranks_than_devices_are_refused_where_a_vendor_s_library_joins_them(monkeypatch):
    closed = []
    sockets = types.SimpleNamespace(rank=0, size=2, close=lambda: closed.append(True))
    monkeypatch.setattr(collectives, "joined", lambda timeout, name: sockets)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda engine: engine == "hccl")
    chip = type("Chip", (type(create("ascend")),), {"place": "hardware"})()
    with pytest.raises(NotClaimed, match=r"^2 ranks of ascend need a device each by 'hccl', and PyTorch sees 1: start 1$"):
        chip.communicator()
    assert closed == [True]


def test_streams_and_events_run_in_order():
    start, end = torch.npu.Event(enable_timing=True), torch.Event("npu", enable_timing=True)
    start.record()
    torch.npu.synchronize()
    end.record()
    assert start.elapsed_time(end) > 0 and end.query()
    with torch.npu.stream(torch.npu.Stream()) as stream:
        stream.wait_stream(torch.npu.current_stream())
        assert stream.record_event().query()


@pytest.mark.parametrize("make", [torch.empty, lambda n, **kwargs: torch.empty_strided((n,), (2,), **kwargs)])
def test_memory_that_nobody_wrote_is_poisoned(make):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn):
        assert make(5, dtype=dtype, device="npu").float().isnan().all().item()
    for dtype in (torch.int32, torch.int64):
        assert (make(5, dtype=dtype, device="npu").abs() > 2**30).all().item()
    assert torch.zeros(5, device="npu").eq(0).all().item()


def test_memory_is_counted_while_tensors_live():
    before = torch.npu.memory_allocated()
    x = torch.zeros(1000, dtype=torch.float32, device="npu")
    assert torch.npu.memory_allocated() - before == 4000 and torch.npu.max_memory_allocated() >= before + 4000
    view = x[10:]
    y = x + 1
    assert torch.npu.memory_allocated() - before == 8000
    del x, y
    assert torch.npu.memory_allocated() - before == 4000 and view.sum() == 0
    del view
    assert torch.npu.memory_allocated() == before
    torch.npu.reset_peak_memory_stats()
    free, total = torch.npu.mem_get_info()
    assert torch.npu.memory_stats()["allocated_bytes.all.peak"] == before == total - free


def test_memory_runs_out():
    _, total = torch.npu.mem_get_info()
    try:
        torch.npu.set_per_process_memory_fraction((torch.npu.memory_allocated() + 1000) / total)
        with pytest.raises(torch.OutOfMemoryError, match="tried to allocate 4000 bytes on emulated device 0, which has"):
            torch.empty(1000, device="npu")
    finally:
        torch.npu.set_per_process_memory_fraction(1.0)
    assert torch.empty(1000, device="npu").numel() == 1000


@pytest.mark.parametrize(("listed", "count"), [(None, 4), ("0,2", 2), ("3", 1), ("", 0), (" 1 , 0 ", 2)])
def test_visible_devices(monkeypatch, listed, count):
    if listed is not None:
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", listed)
    assert visible(4, "ASCEND_RT_VISIBLE_DEVICES") == count


@pytest.mark.parametrize("listed", ["4", "0,0", "-1", "all"])
def test_devices_that_are_not_there(monkeypatch, listed):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", listed)
    with pytest.raises(RuntimeError, match=f"ASCEND_RT_VISIBLE_DEVICES is '{listed}': expected distinct numbers from 0 to 3"):
        visible(4, "ASCEND_RT_VISIBLE_DEVICES")


def test_two_ranks_make_the_text_of_the_reference():
    assert_the_text_of_two_ranks_is_the_reference_s("ascend")
