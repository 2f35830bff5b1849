"""The Ascend stand-ins compute the documented formulas, refuse what the vendor's pages refuse, and promise no more."""

import inspect
import math

import pytest
import torch

from porthal.backends.ascend import emulated as ascend
from porthal.backends.torch.emulation.device import copies

NPU, BF16 = "npu", torch.bfloat16


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=NPU)


def paged(flat, table, block):
    """Scatter per-request rows [request][position, width] into [blocks, block, 1, width] by the block table."""
    cache = torch.full((int(table.max()) + 2, block, 1, flat[0].shape[1]), math.nan, dtype=flat[0].dtype)
    for rows, blocks in zip(flat, table.tolist()):
        for position, row in enumerate(rows):
            cache[blocks[position // block], position % block, 0] = row
    return cache


@pytest.fixture
def indexer():
    """Two requests, 3 and 1 query rows of 40 and 7 keys in scrambled blocks of 16, one padded row, integer data."""
    table = torch.tensor([[4, 0, 3], [2, 1, 1]], dtype=torch.int32)
    keys = [torch.randint(-2, 3, (n, 128)).to(BF16) for n in (40, 7)]
    query, weights = torch.randint(-2, 3, (5, 8, 128)).to(BF16), torch.randint(-3, 4, (5, 8)).to(BF16)
    call = dict(query=query.npu(), key=paged(keys, table, 16).npu(), weights=weights.npu(),
                actual_seq_lengths_query=ints(3, 4), actual_seq_lengths_key=ints(40, 7), block_table=table.npu(),
                layout_query="TND", layout_key="PA_BSND", sparse_count=12, sparse_mode=3)
    rows = [(0, 38), (0, 39), (0, 40), (1, 7)]  # (request, visible keys) of each real row
    score = [(weights[t].double()[:, None] * (query[t].double() @ keys[b][:n].double().T).relu()).sum(0)
             for t, (b, n) in enumerate(rows)]
    return call, score


@pytest.fixture
def attention():
    """Two requests, 2 and 1 query rows of 20 and 5 keys, one padded row, scrambled positions with a -1 tail."""
    table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    c, kp = ([torch.randn(n, w).to(BF16) for n in (20, 5)] for w in (512, 64))
    query, rope = torch.randn(4, 4, 512).to(BF16), torch.randn(4, 4, 64).to(BF16)
    chosen = torch.tensor([[7, 0, 18, 3, -1, -1], [19, 2, 11, 5, 4, 9], [4, 1, -1, -1, -1, -1], [9, 9, 9, 9, 9, 9]])
    key = paged(c, table, 16).npu()
    call = dict(query=query.npu(), key=key, value=key, sparse_indices=chosen.int()[:, None].npu(), scale_value=0.0625,
                block_table=table.npu(), actual_seq_lengths_query=ints(2, 3), actual_seq_lengths_kv=ints(20, 5),
                query_rope=rope.npu(), key_rope=paged(kp, table, 16).npu(), layout_query="TND", layout_kv="PA_BSND",
                attention_mode=2)
    want = []
    for t, b in enumerate((0, 0, 1)):
        picked = chosen[t][chosen[t] >= 0]
        k, r = c[b][picked].double(), kp[b][picked].double()
        p = torch.softmax((query[t].double() @ k.T + rope[t].double() @ r.T) * 0.0625, -1)
        want.append(p @ k)
    return call, torch.stack(want)


@pytest.mark.parametrize(("dtype", "gamma_dtype", "rtol"), [
    (BF16, BF16, 2**-8), (BF16, torch.float32, 2**-8), (torch.float16, torch.float16, 2**-10),
    (torch.float32, torch.float32, 1e-6)])
def test_rms_norm_is_the_formula(torch_npu, dtype, gamma_dtype, rtol):
    x, gamma = torch.randn(3, 2, 96).to(dtype), torch.randn(96).to(gamma_dtype)
    y, rstd = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), epsilon=1e-5)
    want = 1 / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + 1e-5)
    assert y.dtype == dtype and rstd.dtype == torch.float32
    torch.testing.assert_close(rstd.cpu().double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(y.cpu().double(), x.double() * want * gamma.double(), rtol=rtol, atol=1e-6)
    strided = torch_npu.npu_rms_norm(x.npu().transpose(0, 1), gamma.npu(), epsilon=1e-5)[0]
    assert torch.equal(strided.cpu(), y.cpu().transpose(0, 1))


@pytest.mark.parametrize(("x", "gamma", "argument"), [
    (torch.ones(8), torch.ones(8), "input.dim\\(\\) is 1"), (torch.ones(2, 8), torch.ones(7), "gamma.shape"),
    (torch.ones(2, 8).double(), torch.ones(8).double(), "input.dtype is torch.float64"),
    (torch.ones(2, 8), torch.ones(8).half(), "gamma.dtype"),
    (torch.ones(2, 8).bfloat16(), torch.ones(8).half(), "gamma.dtype"),
    (torch.ones(2, 8), torch.ones(()), "gamma.shape"),
])
def test_rms_norm_limits(torch_npu, x, gamma, argument):
    with pytest.raises(RuntimeError, match=argument):
        torch_npu.npu_rms_norm(x.npu(), gamma.npu())


def test_indexer_selects_the_largest_visible_scores(torch_npu, indexer):
    call, score = indexer
    indices, values = torch_npu.npu_lightning_indexer(**call)
    assert indices.shape == (5, 1, 12) and indices.dtype == torch.int32 and values.shape == (0,) and values.dtype == BF16
    for row, s in zip(indices.cpu()[:, 0].tolist(), score):
        kept = min(12, len(s))
        assert row[kept:] == [-1] * (12 - kept) and len(set(row[:kept])) == kept
        assert s[row[:kept]].sort().values.tolist() == s.sort().values[-kept:].tolist()


def test_indexer_takes_ties_from_the_highest_position_in_no_order(torch_npu, indexer):
    call, _ = indexer
    call["weights"].zero_()  # every score is exactly 0
    row = torch_npu.npu_lightning_indexer(**call)[0].cpu()[2, 0].tolist()
    assert set(row) == set(range(28, 40)) and row not in (sorted(row), sorted(row, reverse=True))


def test_indexer_without_a_mask_and_with_batched_queries(torch_npu, indexer):
    call, _ = indexer
    call |= dict(sparse_mode=0, sparse_count=2048)
    indices = torch_npu.npu_lightning_indexer(**call)[0].cpu()
    assert [(indices[t, 0] >= 0).sum().item() for t in range(4)] == [40, 40, 40, 7]
    query = torch.stack([call["query"][:3], call["query"][3:4].expand(3, -1, -1)])
    weights = torch.stack([call["weights"][:3], call["weights"][3:4].expand(3, -1)])
    call |= dict(query=query, weights=weights, layout_query="BSND", actual_seq_lengths_query=ints(3, 1))
    batched = torch_npu.npu_lightning_indexer(**call)[0].cpu()
    assert batched.shape == (2, 3, 1, 2048)
    assert torch.equal(batched[0], indices[:3]) and torch.equal(batched[1, 0], indices[3])


def test_what_the_pages_leave_undefined_is_garbage(torch_npu, indexer, attention):
    padded = torch_npu.npu_lightning_indexer(**indexer[0])[0].cpu()[4]
    assert (padded.abs() > 1000).any()
    call, _ = attention
    call["sparse_indices"][1] = -1
    out, largest, total = torch_npu.npu_sparse_flash_attention(**call)
    assert out[3].isnan().all().item() and out[1].isnan().all().item() and not out[0].isnan().any().item()
    assert largest.shape == total.shape == (0,)


def test_statistics_that_the_paged_layout_does_not_have_come_back_as_garbage_of_an_odd_shape(torch_npu, attention):
    call, _ = attention
    _, largest, total = torch_npu.npu_sparse_flash_attention(**call, return_softmax_lse=True)
    assert largest.shape == total.shape == (16, 4, 0)  # block size, rows, heads // block size


def test_attention_is_the_formula(torch_npu, attention):
    call, want = attention
    out = torch_npu.npu_sparse_flash_attention(**call)[0]
    assert out.shape == (4, 4, 512) and out.dtype == BF16
    torch.testing.assert_close(out.cpu()[:3].double(), want, rtol=2**-7, atol=1e-5)


def test_attention_with_batched_queries(torch_npu, attention):
    call, _ = attention
    rows = torch_npu.npu_sparse_flash_attention(**call)[0].cpu()
    batch = {name: torch.stack([call[name][:2], call[name][2:]]) for name in ("query", "query_rope", "sparse_indices")}
    call |= batch | dict(layout_query="BSND", actual_seq_lengths_query=ints(2, 1))
    out, largest, _ = torch_npu.npu_sparse_flash_attention(**call, return_softmax_lse=True)
    assert torch.equal(out.cpu().flatten(0, 1)[:3], rows[:3])
    assert largest.shape == (2, 1, 2, 4) and largest.isnan().all().item()
    for lengths in (ints(3, 1), ints(2), ints(2, -1)):
        with pytest.raises(RuntimeError, match=r"actual_seq_lengths_query is .* expected 2 row counts from 0 to 2"):
            torch_npu.npu_sparse_flash_attention(**call | dict(actual_seq_lengths_query=lengths))


def test_attention_masks_the_future_in_mode_3_only(torch_npu, attention):
    call, _ = attention
    call["sparse_indices"][0, 0] = ints(19, 3, 18, 0, -1, -1)  # row 0 of 2 sees 19 of 20 keys
    future = torch_npu.npu_sparse_flash_attention(**call)[0].cpu()[0]
    free = torch_npu.npu_sparse_flash_attention(**call, sparse_mode=0)[0].cpu()[0]
    call["sparse_indices"][0, 0] = ints(3, 18, 0, -1, -1, -1)
    past = torch_npu.npu_sparse_flash_attention(**call)[0].cpu()[0]
    assert torch.equal(future, past) and not torch.allclose(free.float(), past.float(), atol=1e-2)


def half(call, name, dtype=torch.float16):
    return {name: call[name].to(dtype)}


SHARED_LIMITS = [
    (lambda c: {"layout_query": "NTD"}, "layout_query is 'NTD'"),
    (lambda c: {"layout_query": "BSND"}, "query.dim\\(\\) is 3"),
    (lambda c: {"sparse_mode": 2}, "sparse_mode is 2"),
    (lambda c: {"pre_tokens": 5}, "pre_tokens is 5"),
    (lambda c: {"next_tokens": 0}, "next_tokens is 0"),
    (lambda c: half(c, "query", torch.float32), "query.dtype is torch.float32"),
    (lambda c: half(c, "key"), "key.dtype is torch.float16"),
    (lambda c: {"query": c["query"].transpose(0, 1).contiguous().transpose(0, 1)}, "query.stride"),
    (lambda c: {"key": c["key"].transpose(0, 1).contiguous().transpose(0, 1)}, "key.stride"),
    (lambda c: {"key": c["key"][:, :8].contiguous()}, "key's block size is 8"),
    (lambda c: {"key": torch.zeros(1, 1040, 1, 128, dtype=BF16, device=NPU)}, "key's block size is 1040"),
    (lambda c: {"key": c["key"].expand(-1, -1, 2, -1).contiguous()}, "key's head count is 2"),
    (lambda c: {"key": c["key"][:, :, 0]}, "key.dim\\(\\) is 3"),
    (lambda c: {"block_table": None}, "block_table is None"),
    (lambda c: {"block_table": c["block_table"].long()}, "block_table.dtype is torch.int64"),
    (lambda c: {"block_table": c["block_table"][:, :1]}, "block_table.shape is"),
    (lambda c: {"block_table": c["block_table"][0]}, "block_table.shape is"),
    (lambda c: {"block_table": c["block_table"] - 1}, "block_table is"),
    (lambda c: {"block_table": c["block_table"] + 9}, "block_table is"),
    (lambda c: {"actual_seq_lengths_query": None}, "actual_seq_lengths_query is None"),
    (lambda c: {"actual_seq_lengths_query": c["actual_seq_lengths_query"].long()}, "actual_seq_lengths_query.dtype"),
    (lambda c: {"actual_seq_lengths_query": c["actual_seq_lengths_query"][None]}, "actual_seq_lengths_query.dim\\(\\)"),
    (lambda c: {"actual_seq_lengths_query": ints(3, 2)}, "actual_seq_lengths_query is"),
    (lambda c: {"actual_seq_lengths_query": ints(3, 9)}, "actual_seq_lengths_query is"),
    (lambda c: {"actual_seq_lengths_query": ints(0, 2, 3)}, "one length for each of 3 requests"),
]


@pytest.mark.parametrize(("change", "message"), [
    *SHARED_LIMITS,
    (lambda c: {"layout_key": "BNSD"}, "layout_key is 'BNSD'"),
    (lambda c: {"actual_seq_lengths_key": None}, "actual_seq_lengths_key is None"),
    (lambda c: {"actual_seq_lengths_key": ints(-1, 7)}, "actual_seq_lengths_key is"),
    (lambda c: {"actual_seq_lengths_key": c["actual_seq_lengths_key"].long()}, "actual_seq_lengths_key.dtype"),
    (lambda c: {"sparse_count": 0}, "sparse_count is 0"),
    (lambda c: {"sparse_count": 2049}, "sparse_count is 2049"),
    (lambda c: {"sparse_count": 3000}, "sparse_count is 3000"),
    (lambda c: {"sparse_count": 9216}, "sparse_count is 9216"),
    (lambda c: {"return_value": True}, "return_value is True"),
    (lambda c: half(c, "weights"), "weights.dtype is torch.float16"),
    (lambda c: {"weights": c["weights"][:4]}, "weights.shape is"),
    (lambda c: {"weights": c["weights"].T.contiguous().T}, "weights.stride"),
    (lambda c: {"query": c["query"][..., :64].contiguous()}, "query.shape.-1. is 64"),
    (lambda c: {"key": c["key"][..., :64].contiguous()}, "key.shape.-1. is 64"),
    (lambda c: {"query": c["query"].repeat(1, 9, 1), "weights": c["weights"].repeat(1, 9)}, "query's head count is 72"),
])
def test_indexer_limits(torch_npu, indexer, change, message):
    call, _ = indexer
    with pytest.raises(RuntimeError, match=f"npu_lightning_indexer: .*{message}"):
        torch_npu.npu_lightning_indexer(**{**call, **change(call)})


@pytest.mark.parametrize("count", [1, 2048, 3072, 8192])
def test_indexer_counts_at_the_limits(torch_npu, indexer, count):
    call, score = indexer
    call |= dict(sparse_count=count, weights=call["weights"].float())
    row = torch_npu.npu_lightning_indexer(**call)[0].cpu()[2, 0]
    assert row.shape == (count,)
    assert score[2][row[row >= 0]].sort().values.tolist() == score[2].sort().values[-count:].tolist()


@pytest.mark.parametrize(("change", "message"), [
    *SHARED_LIMITS,
    (lambda c: {"layout_kv": "PA_NZ"}, "layout_kv is 'PA_NZ'"),
    (lambda c: {"actual_seq_lengths_kv": None}, "actual_seq_lengths_kv is None"),
    (lambda c: {"attention_mode": 0}, "attention_mode is 0"),
    (lambda c: {"sparse_block_size": 64}, "sparse_block_size is 64"),
    (lambda c: {"sinks": torch.zeros(4, device=NPU)}, "sinks is given"),
    (lambda c: {"value": None}, "value is None"),
    (lambda c: dict.fromkeys(("key", "value"), c["key"][..., :256].contiguous()), "key.shape is .*256"),
    (lambda c: {"value": c["key"] + 1}, "value is other data"),
    (lambda c: {"value": c["key"][..., :256].contiguous()}, "value.shape"),
    (lambda c: {"query_rope": None}, "query_rope is None"),
    (lambda c: {"key_rope": None}, "key_rope is None"),
    (lambda c: half(c, "query_rope"), "query_rope.dtype"),
    (lambda c: half(c, "key_rope"), "key_rope.dtype"),
    (lambda c: half(c, "value"), "value.dtype"),
    (lambda c: {"query_rope": c["query_rope"][..., :32].contiguous()}, "query_rope.shape"),
    (lambda c: {"key_rope": c["key_rope"][..., :32].contiguous()}, "key_rope.shape"),
    (lambda c: {"query": c["query"][..., :256].contiguous()}, "query.shape.-1. is 256"),
    (lambda c: {"query": c["query"][:, :3].contiguous(), "query_rope": c["query_rope"][:, :3].contiguous()},
     "query's head count is 3"),
    (lambda c: {"query": c["query"].repeat(1, 64, 1)}, "query's head count is 256"),
    (lambda c: half(c, "sparse_indices", torch.int64), "sparse_indices.dtype is torch.int64"),
    (lambda c: {"sparse_indices": c["sparse_indices"][:3]}, "sparse_indices.shape is"),
    (lambda c: {"sparse_indices": c["sparse_indices"][:, 0]}, "sparse_indices.shape is"),
    (lambda c: {"sparse_indices": c["sparse_indices"][..., :0]}, "sparse_indices.shape is"),
    (lambda c: {"sparse_indices": c["sparse_indices"].transpose(0, 2).contiguous().transpose(0, 2)}, "stride"),
    (lambda c: {"sparse_indices": c["sparse_indices"].flip(-1)}, "sparse_indices is a position after a -1"),
    (lambda c: {"sparse_indices": c["sparse_indices"] + 3}, "sparse_indices is from"),
    (lambda c: {"sparse_indices": c["sparse_indices"] * 0 - 2}, "sparse_indices is from -2"),
])
def test_attention_limits(torch_npu, attention, change, message):
    call, _ = attention
    with pytest.raises(RuntimeError, match=f"npu_sparse_flash_attention: .*{message}"):
        torch_npu.npu_sparse_flash_attention(**{**call, **change(call)})


def test_host_tensors_are_refused(torch_npu, indexer, attention):
    x = torch.ones(2, 8)
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        torch_npu.npu_rms_norm(x, x[0])
    with pytest.raises(RuntimeError, match="same device"):
        torch_npu.npu_rms_norm(x.npu(), x[0])
    select, attend = torch_npu.npu_lightning_indexer, torch_npu.npu_sparse_flash_attention
    for op, (call, _) in ((select, indexer), (attend, attention)):
        with pytest.raises(RuntimeError, match="same device"):
            op(**{**call, "block_table": call["block_table"].cpu()})
        with pytest.raises(NotImplementedError, match="'CPU' backend"):
            op(**{name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in call.items()})


def test_calls_are_counted_and_copy_nothing(torch_npu, indexer, attention):
    copies.reset()
    torch_npu.npu_lightning_indexer(**indexer[0])
    for _ in range(2):
        torch_npu.npu_sparse_flash_attention(**attention[0])
    assert ascend.calls == {"npu_lightning_indexer": 1, "npu_sparse_flash_attention": 2}
    assert (copies.to_host, copies.to_device) == (0, 0)


@pytest.mark.parametrize("schema", ascend.SCHEMAS)
def test_schemas_print_back_and_defaults_agree(torch_npu, schema):
    name = schema.partition("(")[0]
    registered = getattr(torch.ops.npu, name).default._schema
    assert str(registered) == f"npu::{schema}"
    written = inspect.signature(ascend.KERNELS[name]).parameters
    for argument in registered.arguments:
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        assert written[argument.name].default == default
    assert list(written) == [argument.name for argument in registered.arguments]


def test_wrong_calls_get_the_dispatcher_s_error(torch_npu, indexer):
    with pytest.raises(RuntimeError, match="missing value for argument 'key'"):
        torch_npu.npu_lightning_indexer(indexer[0]["query"])
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'layout_kv'"):
        torch_npu.npu_lightning_indexer(**indexer[0], layout_kv="PA_BSND")
    assert not hasattr(torch_npu, "npu_fused_infer_attention_score")  # of the wheel, but no call of this model
