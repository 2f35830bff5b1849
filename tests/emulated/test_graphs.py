"""A captured graph of an emulated device: same memory, frozen numbers of the host, nothing computed before a replay."""

import pytest
import torch

BF16 = torch.bfloat16


def captured(run):
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out = run()
    return graph, out


def test_a_replay_computes_on_the_same_memory():
    x, w = torch.ones(2, 4, device="npu"), torch.full((4, 3), 2.0, device="npu")
    graph, y = captured(lambda: torch.relu(x @ w) + 1)
    assert y.isnan().all().item()
    graph.replay()
    place, first = y.data_ptr(), y.cpu()
    x.fill_(3)
    w.fill_(1)
    graph.replay()
    assert y.data_ptr() == place and first.eq(9).all() and y.cpu().eq(13).all()


def test_what_a_capture_writes_is_undone_and_a_replay_writes_it():
    cache, at, rows = torch.zeros(4, 2, device="npu"), torch.tensor([1, 3], device="npu"), torch.ones(2, 2, device="npu")
    graph, _ = captured(lambda: cache.index_copy_(0, at, rows).add_(1))
    assert cache.sum() == 0
    graph.replay()
    assert cache.tolist() == [[1, 1], [2, 2], [1, 1], [2, 2]]
    at.copy_(torch.tensor([0, 3]))
    graph.replay()
    assert cache.tolist() == [[2, 2], [3, 3], [2, 2], [2, 2]]


def test_numbers_of_the_host_are_frozen():
    x, step = torch.ones(2, device="npu"), torch.tensor(5.0)
    graph, y = captured(lambda: x * step + len(x))
    step.fill_(100)
    graph.replay()
    assert y.tolist() == [7, 7]


def test_vendor_calls_read_their_lengths_again(torch_npu):
    x, counts = torch.ones(4, 2).to(BF16).npu(), torch.tensor([1, 3]).npu()
    weight = torch.tensor([1.0, 1, 10, 10]).to(BF16).reshape(2, 2, 1).npu()
    kwargs = dict(group_list=counts, group_list_type=1, group_type=0, split_item=2)
    graph, [y] = captured(lambda: torch_npu.npu_grouped_matmul([x], [weight], **kwargs))
    graph.replay()
    assert y.flatten().tolist() == [2, 20, 20, 20]
    counts.copy_(torch.tensor([3, 1]))
    graph.replay()
    assert y.flatten().tolist() == [2, 2, 2, 20]


@pytest.mark.parametrize("run", [
    lambda x: x.cpu(), lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any()),
    lambda x: torch.tensor([1.0, 2.0], device="npu"), lambda x: x + torch.ones(2).npu(), lambda x: x[torch.tensor([0])],
])
def test_what_waits_for_the_host_cannot_be_captured(run):
    x = torch.ones(2, device="npu")
    with pytest.raises(RuntimeError, match="while a graph is captured"):
        captured(lambda: run(x))
    assert run(x) is not None and not torch.npu.is_current_stream_capturing()


def test_a_clone_cannot_be_captured():
    x = torch.ones(2, device="npu")
    with pytest.raises(RuntimeError, match="a tensor is cloned while a graph is captured"):
        captured(lambda: x.clone())


def test_one_capture_at_a_time_and_no_replay_before():
    graph = torch.npu.NPUGraph()
    with pytest.raises(RuntimeError, match="has not been captured"):
        graph.replay()
    with torch.npu.graph(graph):
        assert torch.npu.is_current_stream_capturing()
        with pytest.raises(RuntimeError, match="one capture at a time"), torch.npu.graph(torch.npu.NPUGraph()):
            pass
    with pytest.raises(RuntimeError, match="not being captured"):
        graph.capture_end()
    with pytest.raises(RuntimeError, match="capture_error_mode is 'loose'"):
        graph.capture_begin(capture_error_mode="loose")
    with pytest.raises(RuntimeError, match="auto_dispatch_capture is True"):
        torch.npu.graph(graph, auto_dispatch_capture=True)
    graph.reset()
    with pytest.raises(RuntimeError, match="has not been captured"):
        graph.replay()
