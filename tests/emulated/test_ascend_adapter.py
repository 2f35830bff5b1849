"""What Ascend's kernels owe each other and callers, beyond the cases of one op."""

import numpy as np
import pytest
import torch

from porthal.backends.ascend import emulated
from porthal.hal import Batch, Pages, PagesSpec, WeightSpec, bind, create
from porthal.hal.dtypes import narrow

emulated.install()  # before what imports torch_npu
from porthal.backends.ascend.plan import memory  # noqa: E402

SPEC = PagesSpec((("c", 512), ("kp", 64)), "bfloat16", 4, 64)


@pytest.fixture
def ops():
    return bind(backend=create("ascend"), overrides={}, fallback="error", check=False)


def normal(*shape):
    return torch.randn(shape).to(torch.bfloat16).npu()


def test_what_the_indexer_selects_is_what_attention_takes_with_rows_that_have_no_keys(ops):
    """Its garbage for such rows would be refused, or read; a chip of another form would not see it in the cases of one op."""
    keys, kv = ops.alloc_pages(PagesSpec((("k", 128),), "bfloat16", 4, 64)), ops.alloc_pages(SPEC)
    batch = ops.plan(Batch.build([2, 1, 1], [70, 0, 9], [[3, 1], [], [2]], 64))
    ops.kv_write(keys, batch, normal(4, 128))
    ops.kv_write(kv, batch, normal(4, 512), normal(4, 64))
    sel = ops.indexer_topk(normal(4, 8, 128), normal(4, 8).float(), keys, batch, k=16, scale=0.1)
    assert sel.native.length.tolist() == [16, 16, 0, 9] and sel.native.indices[2].tolist() == [-1] * 16
    o = ops.sparse_mla(normal(4, 8, 512), normal(4, 8, 64), kv, sel, batch, scale=0.0625)
    assert bool(o.isfinite().all()) and bool((o[2] == 0).all()) and bool((o[3] != 0).any())


def test_rows_without_a_slot_leave_all_slots_as_they_were(ops):
    kv = ops.alloc_pages(SPEC)
    batch = ops.plan(Batch.build([1, 2], [1, 0], [[2], []], 64))
    rows = normal(3, 512)
    ops.kv_write(kv, batch, rows, normal(3, 64))
    assert torch.equal(kv["c"][128].cpu(), rows[0].cpu()) and int((kv["c"] != 0).any(-1).sum()) == 1
    assert bool((memory(kv, "c")[:64] != 0).any())  # the page in front took them


def test_a_cache_without_the_page_in_front_is_refused_and_not_written_beside(ops):
    field = torch.zeros(256, 512, dtype=torch.bfloat16, device="npu")
    kv = Pages(PagesSpec((("c", 512),), "bfloat16", 4, 64), {"c": field})
    with pytest.raises(RuntimeError, match="storage"):
        ops.kv_write(kv, ops.plan(Batch.build([1], [1], [[2]], 64)), normal(1, 512))


def test_a_token_that_overflows_stays_alone_where_choices_go_nowhere(ops):
    """Choices of other ranks read a row that is nobody's, not the first one."""
    E, H, inner = 4, 64, 32
    generator = np.random.default_rng(0)

    def matrices(name, *shape):
        values = generator.standard_normal(shape).astype("bfloat16")
        return ops.prepare(WeightSpec("moe_experts", name, shape, "bfloat16"), values.__getitem__)

    w13, w2 = matrices("w13", E, 2 * inner, H), matrices("w2", E, H, inner)
    ids = torch.tensor([[0, 9], [9, 3], [9, 9]], dtype=torch.int32).npu()
    weights, x = torch.ones(3, 2).npu(), normal(3, H)
    x[0] = torch.inf
    y = ops.moe_experts(x, w13, w2, ids, weights)
    assert not bool(y[0].isfinite().any())
    assert bool(y[1].isfinite().all()) and bool((y[1] != 0).any()) and bool((y[2] == 0).all())


def test_experts_are_packed_once_and_written_over_in_place(ops):
    spec = WeightSpec("grouped_gemm", "w", (3, 8, 16), "float32")
    first, second = (np.random.default_rng(n).standard_normal(spec.shape).astype(np.float32) for n in (0, 1))
    weight = ops.prepare(spec, first.__getitem__)
    assert weight.native.transpose(1, 2).is_contiguous()
    assert ops.prepare(spec, second.__getitem__, into=weight) is weight
    assert weight.native.transpose(1, 2).is_contiguous()
    np.testing.assert_array_equal(ops.to_logical(weight)["w"], second)


def test_the_prolog_turns_by_more_than_the_bits_of_bfloat16(ops):
    """The call's own tables, in bfloat16, would shift a column for all heads and rows at one position alike."""
    shapes = {"q_a": (1536, 1024), "q_b": (2 * 192, 1536), "kv_a": (576, 1024), "w_uk": (2, 512, 128)}
    random = np.random.default_rng(0).standard_normal
    rows = {name: narrow(random(shape).astype(np.float32) / 32, "bfloat16") for name, shape in shapes.items()}
    q_a, q_b, kv_a, w_uk = (
        ops.prepare(WeightSpec("mla_prolog", name, shape, "bfloat16"), rows[name].__getitem__) for name, shape in shapes.items()
    )
    h, ones = normal(1, 1024), [torch.ones(n).to(torch.bfloat16).npu() for n in (1536, 512)]

    def turned(positions):
        kv, batch = ops.alloc_pages(SPEC), ops.plan(Batch.build([1], [positions], [[0, 1, 2, 3]], 64))
        made = ops.mla_prolog(h, q_a, ones[0], q_b, kv_a, ones[1], w_uk, kv, batch, theta=1e4, eps=1e-5)
        return torch.cat((made[1].cpu()[0], kv["kp"].cpu()[positions - 1 : positions])).double()

    angle = 199 * 1e4 ** (-torch.arange(32, dtype=torch.float64) / 32)
    pairs = torch.view_as_complex(turned(1).unflatten(-1, (32, 2)))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(32, dtype=torch.float64), angle)).flatten(-2)
    assert (turned(200) - expected).abs().max() <= expected.abs().max() * 2**-8
    off = (turned(200) - expected.to(torch.bfloat16).double()).abs() > 0
    assert off.double().mean() < 0.02


def test_a_captured_graph_turns_by_the_positions_of_now(ops):
    x = torch.randn(2, 1, 64).npu()
    attrs = {"theta": 1e4, "layout": "interleaved", "start": 0, "width": 64}
    first, second = (Batch.build([1, 1], lengths, [[0, 1], [2, 3]], 64) for lengths in ([100, 80], [3, 70]))
    batch = ops.plan(first)
    replay = ops.capture(lambda: ops.rope(x, batch, **attrs))
    ops.plan(second, into=batch)
    now = replay().cpu()
    assert torch.equal(now, ops.rope(x, ops.plan(second), **attrs).cpu())
    assert not torch.equal(now, ops.rope(x, ops.plan(first), **attrs).cpu())
