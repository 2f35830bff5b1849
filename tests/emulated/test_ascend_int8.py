"""What Ascend's int8 kernels owe each other and callers, beyond the cases of one op."""

import numpy as np
import pytest
import torch

import porthal
from porthal.backends.ascend import emulated
from porthal.hal import Batch, CallSpec, PagesSpec, WeightSpec, bind, create, scheme_of
from porthal.hal.layouts import ASCEND
from porthal.model import DEMO, load
from porthal.model.quantising import quantise

emulated.install()  # before what imports torch_npu
from porthal.backends.ascend.int8 import Int8  # noqa: E402
from porthal.backends.ascend.int8_caches import PACKED, Int8Caches  # noqa: E402
from porthal.backends.ascend.plan import memory  # noqa: E402

LATENTS = PagesSpec((("c", 512), ("kp", 64)), "bfloat16", 4, 64, "int8_tile_latents")


def bound(op, *specs):
    return bind(backend=create("ascend"), profile={op: specs}, overrides={}, fallback="error", check=False)


def normal(*shape):
    return torch.randn(shape).to(torch.bfloat16).npu()


def coded(op, operand, *shape):
    """A weight's spec and its parts."""
    parts = scheme_of("int8_channel").quantised(np.random.default_rng(0).standard_normal(shape))
    return WeightSpec(op, operand, shape, "bfloat16", "int8_channel"), parts


def test_a_cache_of_latents_is_the_rows_that_attention_reads():
    dims = {"T": 2, "A": 512, "B": 64, "P": 4, "block_size": 64}
    dtypes = dict.fromkeys(("pages", "first", "second"), "bfloat16")
    ops = bound("kv_write", CallSpec(dims, dtypes, {}, {"pages": LATENTS.scheme}))
    kv = ops.alloc_pages(LATENTS)
    batch = ops.plan(Batch.build([1, 1], [1, 0], [[2], []], 64))
    ops.kv_write(kv, batch, normal(2, 512), normal(2, 64))
    logical = ops.to_logical(kv)
    assert np.abs(logical["c"][128]).max() == 127 and (logical["c_scale"][128] > 0).all()
    assert not logical["c"][:128].any() and not logical["c"][129:].any()
    rows = kv[PACKED].cpu().numpy()
    np.testing.assert_array_equal(rows.view(np.uint8), ASCEND.together(LATENTS, logical))
    assert bool((memory(kv, PACKED)[:64] != 0).any())  # the page in front took the row without a slot
    again = ops.from_logical(LATENTS, logical)
    np.testing.assert_array_equal(again[PACKED].cpu().numpy(), rows)


@pytest.mark.parametrize(("op", "operand", "shape"), [
    ("linear", "w", (6, 10)), ("grouped_gemm", "w", (3, 6, 10)),
    ("moe_experts", "w13", (3, 8, 10)), ("moe_experts", "w2", (3, 10, 4)),
])  # fmt: skip
def test_weights_are_packed_and_written_over_in_place(op, operand, shape):
    chip = create("ascend")
    spec, parts = coded(op, operand, *shape)
    weight = chip.prepare(spec, lambda index: parts)
    held = {name: part.data_ptr() for name, part in weight.native.items()}
    other = scheme_of("int8_channel").quantised(np.random.default_rng(1).standard_normal(shape) * 3)
    assert chip.prepare(spec, lambda index: other, weight) is weight
    logical = chip.to_logical(weight)
    assert set(logical) == {"codes", "scale"}
    for name, part in other.items():
        np.testing.assert_array_equal(logical[name], part)
    assert {name: part.data_ptr() for name, part in weight.native.items()} == held


def test_a_model_of_plain_and_int8_weights_has_each_on_its_kernel():
    facts = {"T": 3, "K": 96, "N": 64}, dict.fromkeys(("x", "w"), "bfloat16"), {"out": "x"}
    ops = bound("linear", CallSpec(*facts, {"w": "none"}), CallSpec(*facts, {"w": "int8_channel"}))
    assert ops.choices["linear"].reason == "torch_npu.npu_dynamic_quant+npu_quant_matmul where w is int8_channel"
    spec, parts = coded("linear", "w", 64, 96)
    x, w = normal(3, 96), ops.prepare(spec, lambda index: parts)
    numbers = scheme_of("int8_channel").numbers(parts)
    plain = ops.prepare(WeightSpec("linear", "w", (64, 96), "bfloat16"), numbers.astype("bfloat16").__getitem__)
    emulated.calls.clear()
    exact = ops.linear(x, plain, out="x").float()
    assert emulated.calls["npu_quant_matmul"] == 0
    close = ops.linear(x, w, out="x").float()
    assert emulated.calls["npu_quant_matmul"] == 1
    assert 0 < float((close - exact).abs().max()) < 0.03 * float(exact.abs().max())


def test_columns_of_zeros_do_not_take_the_room_of_float16():
    """Their scales may be anything, and are 1."""
    spec, parts = coded("grouped_gemm", "w", 2, 6, 64)
    parts["codes"][0, 3], parts["scale"][...] = 0, 1e-9
    parts["scale"][0, 3] = 1.0
    dtypes = {"x": "bfloat16", "w": "bfloat16", "counts": "int32"}
    ops = bound("grouped_gemm", CallSpec({"M": 4, "K": 64, "N": 6, "E": 2}, dtypes, {}, {"w": "int8_channel"}))
    base, x, counts = create("torch:npu:0"), normal(4, 64), torch.tensor([2, 2], dtype=torch.int32).npu()
    y, wanted = (made.grouped_gemm(x, made.prepare(spec, lambda index: parts), counts) for made in (ops, base))
    torch.testing.assert_close(y.float().cpu(), wanted.float().cpu(), rtol=2**-7, atol=1e-12)
    assert bool((y[:2, 3] == 0).all())


def test_int8_kernels_stand_in_a_captured_graph():
    chip, x, heads = create("ascend"), normal(3, 64), normal(3, 2, 64)
    matrices = {}
    for op, operand, *shape in (("linear", "w", 8, 64), ("head_linear", "w", 2, 8, 64),
                                ("moe_experts", "w13", 4, 32, 64), ("moe_experts", "w2", 4, 64, 16)):  # fmt: skip
        spec, parts = coded(op, operand, *shape)
        matrices[op, operand] = chip.prepare(spec, lambda index, parts=parts: parts)
    ids, weights = torch.tensor([[0, 3], [1, -1], [9, 2]], dtype=torch.int32).npu(), torch.rand(3, 2).npu()
    keys = chip.alloc_pages(PagesSpec((("k", 128),), "bfloat16", 4, 64, "int8_half_keys"))
    kv, batch = chip.alloc_pages(LATENTS), chip.plan(Batch.build([2, 1], [70, 9], [[3, 1], [2]], 64))
    rows, queries, head_weights = normal(3, 128), normal(3, 8, 128), torch.randn(3, 8).npu()
    latents, rotated, q_latent, q_rope = normal(3, 512), normal(3, 64), normal(3, 8, 512), normal(3, 8, 64)

    def step():
        Int8Caches.kv_write(chip, keys, batch, rows)
        Int8Caches.kv_write(chip, kv, batch, latents, rotated)
        selection = Int8Caches.indexer_topk(chip, queries, head_weights, keys, batch, k=16, scale=0.1)
        return (
            Int8.linear(chip, x, matrices["linear", "w"]),
            Int8.head_linear(chip, heads, matrices["head_linear", "w"]),
            Int8.moe_experts(chip, x, matrices["moe_experts", "w13"], matrices["moe_experts", "w2"], ids, weights),
            Int8Caches.sparse_mla(chip, q_latent, q_rope, kv, selection, batch, scale=0.0625),
        )

    now = [y.clone() for y in step()]
    replay = chip.capture(step)
    x.mul_(2)
    assert torch.equal(replay()[0], now[0] * 2)
    x.div_(2)
    for got, wanted in zip(replay(), now):
        assert torch.equal(got, wanted) and bool(wanted.isfinite().all())


def test_a_quantised_checkpoint_runs_on_int8_calls(tmp_path):
    quantise(DEMO, tmp_path / "int8", "ascend-w8a8")
    tokens = list(b"    def get(self, name):\n")

    def logits(backend):
        return load(tmp_path / "int8", porthal.bind(backend), dtype="bfloat16").forward(tokens)

    emulated.calls.clear()
    ours = logits("ascend")
    assert min(emulated.calls[f"npu_{name}"] for name in ("quant_matmul", "grouped_matmul_swiglu_quant_v2")) > 0
    theirs = logits("torch:npu:0")
    assert float(np.abs(ours - theirs).max()) < 0.05 * float(np.abs(theirs).max())


def test_codes_of_a_row_of_zeros_are_zeros_where_they_are_kept(torch_npu):
    """They say 0 whatever they are, so that no case of the suite tells; the op leaves them undefined."""
    chip, x = create("ascend"), torch.zeros(2, 256, dtype=torch.bfloat16).npu()
    left, _ = torch_npu.npu_dynamic_quant(x)
    assert left.any().item()
    assert not chip.quantize(x, scheme="int8_token").native["codes"].any().item()
