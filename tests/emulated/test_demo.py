"""The demo checkpoint on an emulated NPU: Ascend's own calls carry the model, and its predictions are the reference's."""

import pytest

from porthal.backends.ascend import emulated as ascend
from porthal.backends.torch.emulation import device
from porthal.model.generate import generate
from tests import demo

OWN = ("npu_rms_norm", "npu_lightning_indexer", "npu_sparse_flash_attention")


def test_own_kernels_serve_the_model_in_bfloat16_and_decline_float32():
    own = {op for op, c in demo.model("ascend", "bfloat16").ops.choices.items() if c.status == "own"}
    assert own == {"rms_norm", "indexer_topk", "sparse_mla"}
    choices = demo.model("ascend", "float32").ops.choices
    assert choices["sparse_mla"].status == "inherited"
    assert choices["sparse_mla"].reason == "ascend: q_latent is float32, the kernel takes one of bfloat16, float16"


def test_every_token_goes_through_the_vendors_calls():
    model = demo.model("ascend", "bfloat16")
    copied = model.ops.backend.host_copies
    ascend.calls.clear()
    made = generate(model, [demo.PROMPT], 16)
    layers, full = len(model.blocks), sum(block.full for block in model.blocks)
    assert made.forwards == 16
    # Per step: three norms in a layer's prolog and first norm; the residual adds are fused with norms of the torch base.
    assert ascend.calls["npu_lightning_indexer"] == 16 * full
    assert ascend.calls["npu_sparse_flash_attention"] == 16 * layers
    assert ascend.calls["npu_rms_norm"] == 16 * (2 * layers + 1)
    assert model.ops.backend.place == "emulated device"
    assert model.ops.backend.host_copies - copied == 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_per_byte_are_the_references(dtype):
    assert demo.bits_per_byte("ascend", dtype) == pytest.approx(demo.bits_per_byte("reference", dtype), rel=1e-3)


def test_text_is_the_references():
    """Twice as much in tests/proof."""
    assert demo.text("ascend", "float32", 24) == demo.text("reference", "float32", 24)
    assert demo.explained("ascend", "bfloat16", 24)
    assert device.copies.to_host > 0
