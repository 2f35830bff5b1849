"""What a captured decode step holds is launches with their memory and numbers: made again, they see what was written since."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from porthal.hal import Batch, PagesSpec, Weight, WeightSpec

SIZE, K = 16, 16


@pytest.fixture
def graphs(cuda, monkeypatch):
    """The kernels in Triton as where they are captured, and a function that gives what a call launches as one to make again."""
    from triton.runtime import interpreter

    from porthal.backends.cuda.own import Own

    cuda = Own()
    monkeypatch.setattr(Own, "captures", True)
    launched = interpreter.GridExecutor.__call__

    def recorded(run):
        calls = []

        def launch(*args, **kwargs):
            calls.append(partial(launched, *args, **kwargs))
            launched(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter.GridExecutor, "__call__", launch)
            results = run()
        assert len(calls) > 10
        return results, lambda: [call() for call in calls]

    return cuda, recorded


def batch_of(*lengths):
    tables = np.arange(len(lengths) * 5, dtype=np.int32).reshape(len(lengths), 5)
    return Batch.build([1] * len(lengths), lengths, tables, SIZE)


def test_a_replay_sees_shorter_and_padded_requests_and_other_values(graphs):
    cuda, recorded = graphs
    rng = np.random.default_rng(0)
    shapes = {"c": (3, 24), "r": (3, 8), "iq": (3, 4, 24), "w": (3, 4), "q": (3, 5, 24), "qr": (3, 5, 8), "logits": (3, 8)}

    def values():
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    x = {name: cuda.from_numpy(value) for name, value in values().items()}
    bias, old = cuda.from_numpy(np.zeros(8, np.float32)), rng.standard_normal((15 * SIZE, 24)).astype(np.float32)

    def weight(*shape):
        spec = WeightSpec("grouped_gemm", "w", shape, "float32")
        return Weight(spec, cuda.from_numpy(rng.standard_normal(shape).astype(np.float32)))

    w13, w2 = weight(8, 20, 24), weight(8, 24, 10)
    kv = cuda.alloc_pages(PagesSpec((("c", 24), ("kp", 8)), "float32", 15, SIZE))
    keys = cuda.alloc_pages(PagesSpec((("k", 24),), "float32", 15, SIZE))

    def fill():
        for pages in (kv, keys):
            for field in pages.leaves():
                cuda.write(field, cuda.from_numpy(old[:, : field.shape[1]].copy()))

    def step(batch):
        cuda.kv_write(kv, batch, x["c"], x["r"])
        cuda.kv_write(keys, batch, x["c"])
        sel = cuda.indexer_topk(x["iq"], x["w"], keys, batch, k=K, scale=0.5)
        o = cuda.sparse_mla(x["q"], x["qr"], kv, sel, batch, scale=0.25)
        ids, weights = cuda.moe_route(x["logits"], bias, k=2, scale=2.5)
        y = cuda.moe_experts(o[:, 0], w13, w2, ids, weights)
        return [*sel.native, o, y, cuda.argmax(y), *kv.leaves(), *keys.leaves()]

    fill()
    planned = cuda.plan(batch_of(70, 40, 33))
    results, replay = recorded(lambda: step(planned))
    for lengths in ((17, 0, 64), (68, 16, 0), (70, 40, 33)):
        for name, value in values().items():
            cuda.write(x[name], cuda.from_numpy(value))
        fill()
        cuda.plan(batch_of(*lengths).within(planned), planned)
        replay()
        found = [cuda.to_numpy(r) for r in results]
        fill()
        wanted = [cuda.to_numpy(r) for r in step(cuda.plan(batch_of(*lengths)))]
        for a, b in zip(found, wanted):
            np.testing.assert_array_equal(a, b)
        assert [min(n, K) for n in lengths] == found[1].tolist()
