"""The torch backend on a device that is not the CPU: its kernels stay there, and only the expert counts are read back."""

import numpy as np
import pytest

import porthal
from porthal.backends.torch.emulation import device
from porthal.hal import Batch, PagesSpec, QuantisedSpec, SelectionSpec, WeightSpec

BATCH = Batch.build([1, 3, 0, 5, 2], [130, 70, 0, 5, 0], [[3, 1, 4], [0, 5], [], [2], []], 64)
T = BATCH.T
rng = np.random.default_rng(0)


def x(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def w(op: str, operand: str, *shape: int) -> tuple[WeightSpec, dict]:
    return WeightSpec(op, operand, shape, "float32"), {"w": x(*shape)}


def pages(**fields: int) -> tuple[PagesSpec, dict]:
    spec = PagesSpec(tuple(fields.items()), "float32", 6, 64)
    return spec, {name: x(spec.slots, width) for name, width in fields.items()}


LENGTH = np.minimum(BATCH.visible, 4).astype(np.int32)
FIRST = np.where(np.arange(4) < LENGTH[:, None], np.arange(4), -1).astype(np.int32)
SELECTION = SelectionSpec(T, 4), {"indices": FIRST, "length": LENGTH}
IDS = np.tile(np.array([[0, 3, -1]], np.int32), (T, 1))
SOURCE = np.where(np.arange(3 * T) % 4 > 0, np.arange(3 * T), -1).astype(np.int32)
CODES = QuantisedSpec((T, 7), "int8_token"), {"codes": rng.integers(-127, 128, (T, 7), np.int8), "scale": np.abs(x(T, 1))}
u, cold, drafts = rng.random(T, np.float32), np.zeros(T, np.float32), np.zeros((T, 2), np.int32)
CALLS = {
    "linear": ([x(T, 7), w("linear", "w", 5, 7)], {}),
    "head_linear": ([x(T, 3, 7), w("head_linear", "w", 3, 5, 7)], {}),
    "rms_norm": ([x(T, 7), x(7)], {"eps": 1e-5}),
    "add_rms_norm": ([x(T, 7), x(T, 7), x(7)], {"eps": 1e-5}),
    "layer_norm": ([x(T, 7), x(7), x(7)], {"eps": 1e-5}),
    "rope": ([x(T, 3, 12), BATCH], {"theta": 1e4, "layout": "interleaved", "start": 4, "width": 8}),
    "silu_mul": ([x(T, 8)], {}),
    "add": ([x(T, 8), x(T, 8)], {}),
    "cast": ([x(T, 8)], {"to": "bfloat16"}),
    "concat": ([x(T, 8), x(T, 3)], {}),
    "take_rows": ([x(T, 8), np.array([3, -1], np.int32)], {}),
    "embedding": ([IDS[:, 1], w("embedding", "table", 4, 5)], {}),
    "log_softmax": ([x(T, 8)], {}),
    "gather_logprob": ([x(T, 8), IDS[:, 1]], {}),
    "moe_route": ([x(T, 8), x(8)], {"k": 3, "scale": 2.5, "n_group": 4, "topk_group": 2}),
    "moe_permute": ([x(T, 8), IDS], {"E": 4}),
    "moe_unpermute": ([x(3 * T, 8), SOURCE, x(T, 3)], {}),
    "kv_write": ([pages(c=8, kp=4), BATCH, x(T, 8), x(T, 4)], {}),
    "page_copy": ([pages(c=8, kp=4), np.array([1], np.int32), np.array([0], np.int32)], {}),
    "indexer_scores": ([x(T, 2, 8), x(T, 2), pages(k=8), BATCH], {"scale": 0.5}),
    "topk": ([x(T, 130), BATCH], {"k": 4}),
    "indexer_topk": ([x(T, 2, 8), x(T, 2), pages(k=8), BATCH], {"k": 4, "scale": 0.5}),
    "select_rows": ([SELECTION, np.array([2, 1], np.int32)], {}),
    "sparse_mla": ([x(T, 3, 8), x(T, 3, 4), pages(c=8, kp=4), SELECTION, BATCH], {"scale": 0.5}),
    "argmax": ([x(T, 9)], {}),
    "sample": ([x(T, 9), u, cold, IDS[:, 0], u], {}),
    "speculative_verify": ([x(T, 3, 9), drafts, x(T, 3), cold, IDS[:, 0], u], {}),
    "check_finite": ([x(T, 9), IDS[:, 0]], {}),
    "grouped_gemm": ([x(9, 7), w("grouped_gemm", "w", 3, 5, 7), np.array([4, 0, 2], np.int32)], {}),
    "quantize": ([x(T, 7)], {"scheme": "int8_token"}),
    "dequantize": ([CODES], {"out": "float32"}),
    "moe_experts": (
        [x(T, 8), w("moe_experts", "w13", 4, 12, 8), w("moe_experts", "w2", 4, 8, 6), IDS, x(T, 3)],
        {},
    ),
}
READ_BACK = {"grouped_gemm": 1, "moe_experts": 1}  # the rows per expert decide the shapes of the products


@pytest.fixture(scope="module")
def npu(torch_npu) -> porthal.Binding:
    return porthal.bind("torch:npu:0", overrides={}, fallback="error")


def send(binding: porthal.Binding, value: object) -> object:
    if isinstance(value, tuple):
        return binding.from_logical(*value)
    return binding.plan(value) if isinstance(value, Batch) else binding.from_numpy(value)


def leaves(out: object) -> list:
    if hasattr(out, "leaves"):
        return list(out.leaves())
    return [leaf for part in out for leaf in leaves(part)] if isinstance(out, tuple) else [out]


def test_every_kernel_is_called_here(npu: porthal.Binding) -> None:
    assert set(CALLS) == {op for op, choice in npu.choices.items() if choice.status == "own"}


@pytest.mark.parametrize("op", CALLS)
def test_kernels_stay_on_the_device(npu: porthal.Binding, op: str) -> None:
    operands, attrs = CALLS[op]
    host = porthal.bind("torch", overrides={}, fallback="error")
    expected = leaves(getattr(host, op)(*(send(host, v) for v in operands), **attrs))
    sent = [send(npu, v) for v in operands]
    device.copies.reset()
    found = leaves(getattr(npu, op)(*sent, **attrs))
    assert (device.copies.to_host, device.copies.to_device) == (READ_BACK.get(op, 0), 0)
    for got, golden in zip(found, expected, strict=True):
        assert npu.backend.refuses_array(got) is None
        np.testing.assert_array_equal(npu.to_numpy(got), host.to_numpy(golden))


def test_a_plan_is_one_copy(npu: porthal.Binding) -> None:
    device.copies.reset()
    npu.plan(BATCH)
    assert (device.copies.to_host, device.copies.to_device) == (0, 1)


def test_a_tensor_on_the_host_is_refused(npu: porthal.Binding) -> None:
    from torch import zeros

    assert npu.backend.refuses_array(zeros(1)) == "on cpu, expected a tensor on npu:0"
