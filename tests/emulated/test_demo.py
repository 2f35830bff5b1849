"""The demo checkpoint on an emulated NPU: Ascend's own calls carry the model, and its predictions are the reference's."""

import pytest

import porthal
from porthal.backends.ascend import emulated as ascend
from porthal.backends.torch.emulation import device
from porthal.model.generate import generate
from porthal.model.load import DEMO, load
from tests import demo

ROWS = {"add_rms_norm", "kv_write", "rms_norm", "rope", "silu_mul"}
EXPERTS = {"grouped_gemm", "moe_permute", "moe_route", "quantize"}  # the last, which the model does not call, of any dtype
HALVES = {"indexer_topk", "moe_experts", "sparse_mla"}  # of bfloat16 alone, or of float16 too


def own(dtype):
    return {op for op, c in demo.model("ascend", dtype).ops.choices.items() if c.status == "own"}


def test_own_kernels_serve_the_model_and_decline_what_is_theirs_in_bfloat16_alone():
    assert own("bfloat16") == ROWS | EXPERTS | HALVES
    assert own("float32") == ROWS | EXPERTS
    choices = demo.model("ascend", "float32").ops.choices
    assert choices["sparse_mla"].status == "inherited"
    why = "npu_sparse_flash_attention: q_latent is float32, the kernel takes one of bfloat16, float16"
    assert choices["sparse_mla"].reason.startswith(f"torch_npu.{why}")


def test_every_token_goes_through_the_vendors_calls():
    model = demo.model("ascend", "bfloat16")
    copied = model.ops.backend.host_copies
    ascend.calls.clear()
    made = generate(model, [demo.PROMPT], 16)
    layers, full = len(model.blocks), sum(block.full for block in model.blocks)
    experts = layers - 1  # the first layer is dense
    assert made.forwards == 16
    # Per step: two norms in the front of each layer and one at the end; those behind a residual add are fused with it.
    assert ascend.calls["npu_lightning_indexer"] == 16 * full
    assert ascend.calls["npu_sparse_flash_attention"] == 16 * layers
    assert ascend.calls["npu_rms_norm"] == 16 * (2 * layers + 1)
    assert ascend.calls["npu_add_rms_norm"] == 16 * 2 * layers
    assert ascend.calls["npu_rotary_mul"] == 16 * (2 * layers + 2 * full)
    assert ascend.calls["npu_scatter_nd_update_"] == 16 * (2 * layers + full)
    assert ascend.calls["npu_grouped_matmul"] == 16 * 2 * experts
    assert ascend.calls["npu_moe_gating_top_k"] == ascend.calls["npu_moe_init_routing_v2"] == 16 * experts
    assert ascend.calls["npu_moe_token_unpermute"] == 16 * 2 * experts  # a router's weights go in two parts
    assert ascend.calls["npu_swiglu"] == 16 * (layers + experts)  # of the dense layer, the shared experts and the routed ones
    assert model.ops.backend.place == "emulated device"
    assert model.ops.backend.host_copies - copied == 16


def test_the_decode_step_is_a_graph_and_its_text_the_same():
    model = load(DEMO, porthal.bind("ascend"), dtype="bfloat16")
    assert model.ops.captures and not demo.model("ascend", "bfloat16").ops.captures  # whose profile asks for the scores too
    assert model.generate(demo.PROMPT, 24) == demo.text("ascend", "bfloat16", 24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_per_byte_are_the_references(dtype):
    assert demo.bits_per_byte("ascend", dtype) == pytest.approx(demo.bits_per_byte("reference", dtype), rel=1e-3)


def test_text_is_the_references():
    """Twice as much in tests/proof."""
    assert demo.text("ascend", "float32", 24) == demo.text("reference", "float32", 24)
    assert demo.explained("ascend", "bfloat16", 24)
    assert device.copies.to_host > 0
