"""The references, op by op, against the modules of transformers' glm_moe_dsa with random weights.

transformers' modules compute in the dtype of their weights but for a few forced float32 steps: where there is none,
float64 modules must agree to 1e-12, elsewhere to float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from porthal.hal import Batch, Pages, PagesSpec, contracts
from tests.oracles import tiny

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.23")
from transformers.models.glm_moe_dsa import GlmMoeDsaConfig  # noqa: E402
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as hf  # noqa: E402

REF = {name: contract.reference for name, contract in contracts().items()}
CLOSE = 1e-12  # float64 against float64
SINGLE = 2e-6  # where transformers goes through float32


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(31)


def config_of(**changes: Any) -> Any:
    raw = {k: v for k, v in tiny.CONFIG.items() if k not in ("architectures", "dtype", "latent_norm_eps")}
    config = GlmMoeDsaConfig(**(copy.deepcopy(raw) | changes))
    config._attn_implementation = config._experts_implementation = "eager"
    return config


def filled(module: Any, rng: np.random.Generator) -> Any:
    """The module in float64 with random weights."""
    module = module.double().eval()
    for name, value in module.named_parameters():
        value.copy_(t(rng.normal(1, 0.3, value.shape) if "norm" in name else rng.normal(0, 0.3, value.shape)))
    return module


def t(x: Any) -> Any:
    return torch.from_numpy(np.array(x))


def n(x: Any) -> Any:
    return x.detach().numpy()


def one_request(length: int, size: int = 4) -> Batch:
    pages = np.random.default_rng(1).permutation(-(-length // size)).tolist()
    return Batch.build([length], [length], [pages], size)


def close(actual: Any, expected: Any, tolerance: float) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, float(np.abs(expected).max())))


# -- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rms_norm(eps: float, scale: float, rng: np.random.Generator) -> None:
    module = hf.GlmMoeDsaRMSNorm(96, eps).double()
    module.weight.data = t(rng.normal(1, 0.3, 96))
    x = rng.standard_normal((7, 96)) * scale
    close(REF["rms_norm"](x, n(module.weight), eps=eps), n(module(t(x))), SINGLE)


def test_rms_norm_in_bfloat16_is_within_its_two_roundings(rng: np.random.Generator) -> None:
    """transformers rounds before the weight and after it: what the reference's point permits."""
    module = hf.GlmMoeDsaRMSNorm(96, 1e-5).bfloat16()
    module.weight.data = t(rng.normal(1, 0.3, 96)).bfloat16()
    x = t(rng.standard_normal((50, 96))).bfloat16()
    expected = REF["rms_norm"](n(x.double()), n(module.weight.double()), eps=1e-5)
    relative = np.abs(n(module(x).double()) / expected - 1)
    assert 2.0**-9 < relative.max() < 2 * 2.0**-8 * 1.01


def test_layer_norm_of_the_indexer(rng: np.random.Generator) -> None:
    module = filled(hf.GlmMoeDsaIndexer(config_of(), 0), rng).k_norm
    assert module.eps == 1e-6
    x = rng.standard_normal((9, 32)) * 3 + 1
    close(REF["layer_norm"](x, n(module.weight), n(module.bias), eps=1e-6), n(module(t(x))), CLOSE)


# -- rotary positions ------------------------------------------------------------------------------------------------


def rotary(config: Any, positions: Any) -> tuple[Any, Any]:
    module = hf.GlmMoeDsaRotaryEmbedding(config)
    assert module.inv_freq.dtype == torch.float32
    assert len(module.inv_freq) == config.qk_rope_head_dim // 2
    assert module.attention_scaling == 1.0
    return module(torch.zeros(1, dtype=torch.float64), t(positions)[None])


def interleaved(x: Any) -> Any:
    """transformers gives (first of every pair | second of every pair); the contract keeps the pairs side by side."""
    half = x.shape[-1] // 2
    return np.stack([x[..., :half], x[..., half:]], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("theta", [1e4, 1e6, 8e6])
def test_rope_interleaved(theta: float, rng: np.random.Generator) -> None:
    config = config_of(rope_parameters={"rope_type": "default", "rope_theta": theta})
    batch = one_request(40)
    q, k = rng.standard_normal((40, 4, 8)), rng.standard_normal((40, 1, 8))
    cos, sin = rotary(config, batch.positions)
    turned = hf.apply_rotary_pos_emb_interleave(t(q)[None], t(k)[None], cos, sin, unsqueeze_dim=2)
    for x, expected in zip((q, k), turned):
        y = REF["rope"](x, batch, theta=theta, layout="interleaved", start=0, width=8)
        # An angle of up to 39, in float32, is off by 39 * 2^-24 * a few.
        close(y, interleaved(n(expected[0])), 1e-5)
    assert np.abs(y - n(turned[1][0])).max() > 0.1  # the order of the result is not transformers' own


def test_order_inside_the_head_does_not_matter_to_scores(rng: np.random.Generator) -> None:
    batch = one_request(12)
    q, k = rng.standard_normal((12, 4, 8)), rng.standard_normal((12, 1, 8))
    cos, sin = rotary(config_of(), batch.positions)
    turned = hf.apply_rotary_pos_emb_interleave(t(q)[None], t(k)[None], cos, sin, unsqueeze_dim=2)
    theirs = torch.einsum("bthd,bsgd->ths", *turned)
    ours = (REF["rope"](x, batch, theta=1e6, layout="interleaved", start=0, width=8) for x in (q, k))
    close(np.einsum("thd,sgd->ths", *ours), n(theirs), 1e-5)


def test_rope_in_the_last_part_of_a_head(rng: np.random.Generator) -> None:
    batch = one_request(10)
    x = rng.standard_normal((10, 4, 32))
    cos, sin = rotary(config_of(), batch.positions)
    last = t(x[..., 24:])[None]
    expected, _ = hf.apply_rotary_pos_emb_interleave(last, last, cos, sin, unsqueeze_dim=2)
    y = REF["rope"](x, batch, theta=1e6, layout="interleaved", start=24, width=8)
    np.testing.assert_array_equal(y[..., :24], x[..., :24])
    close(y[..., 24:], interleaved(n(expected[0])), 1e-5)


# -- experts ---------------------------------------------------------------------------------------------------------


def mlp_of(module: Any, x: Any) -> Any:
    gate_up = np.concatenate([n(module.gate_proj.weight), n(module.up_proj.weight)])
    return REF["linear"](REF["silu_mul"](REF["linear"](x, gate_up)), n(module.down_proj.weight))


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_mlp(scale: float, rng: np.random.Generator) -> None:
    module = filled(hf.GlmMoeDsaMLP(config_of()), rng)
    x = rng.standard_normal((5, 96)) * scale
    close(mlp_of(module, x), n(module(t(x))), CLOSE)


def router(rng: np.random.Generator, **changes: Any) -> Any:
    module = hf.GlmMoeDsaTopkRouter(config_of(**changes)).eval()
    module.weight.copy_(t(rng.normal(0, 0.15, module.weight.shape)))
    module.e_score_correction_bias.copy_(t(rng.normal(0, 0.2, module.e_score_correction_bias.shape)))
    return module


ROUTERS = {
    "GLM-5's, one group": {"n_routed_experts": 16, "num_experts_per_tok": 4},
    "groups": {"n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    "groups of two": {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_group": 8, "topk_group": 1},
    "all experts": {"n_routed_experts": 8, "num_experts_per_tok": 8},
    "one expert, unscaled": {"n_routed_experts": 8, "num_experts_per_tok": 1, "routed_scaling_factor": 1.0},
}


@pytest.mark.parametrize("changes", ROUTERS.values(), ids=ROUTERS)
def test_router(changes: dict[str, Any], rng: np.random.Generator) -> None:
    module = router(rng, **changes)
    x = rng.standard_normal((60, 96)).astype(np.float32)
    logits, weights, ids = map(n, module(t(x)))
    close(REF["linear"](x.astype(float), n(module.weight).astype(float)), logits.astype(float), SINGLE)
    groups = {key: changes.get(key, 1) for key in ("n_group", "topk_group")}
    k, scale = changes["num_experts_per_tok"], changes.get("routed_scaling_factor", 2.5)
    bias = n(module.e_score_correction_bias).astype(float)
    ours, mine = REF["moe_route"](logits.astype(float), bias, k=k, scale=scale, **groups)
    order, theirs = np.argsort(ours, axis=1), np.argsort(ids, axis=1)  # transformers leaves the order free
    np.testing.assert_array_equal(np.take_along_axis(ours, order, 1), np.take_along_axis(ids, theirs, 1))
    close(np.take_along_axis(mine, order, 1), np.take_along_axis(weights, theirs, 1).astype(float), SINGLE)
    np.testing.assert_allclose(mine.sum(1), scale, rtol=1e-12)


def test_experts_and_the_shared_one(rng: np.random.Generator) -> None:
    module = filled(hf.GlmMoeDsaMoE(config_of()), rng)
    module.gate.e_score_correction_bias.copy_(t(rng.normal(0, 0.2, 8)))
    x = rng.standard_normal((20, 96))
    _, weights, ids = module.gate(t(x))
    w13, w2 = n(module.experts.gate_up_proj), n(module.experts.down_proj)
    chosen, shares = n(ids).astype(np.int32), n(weights).astype(float)
    routed = REF["moe_experts"](x, w13, w2, chosen, shares)
    close(routed, n(module.experts(t(x), ids, weights)), CLOSE)
    shared = module.shared_experts
    shared13 = np.concatenate([n(shared.gate_proj.weight), n(shared.up_proj.weight)])
    layer = REF["moe_layer"](x, w13, w2, chosen, shares, shared13, n(shared.down_proj.weight))
    close(layer, n(module(t(x)[None]))[0], CLOSE)
    assert np.abs(layer - routed).max() > 0.1


# -- indexer and attention -------------------------------------------------------------------------------------------


def masks(length: int) -> tuple[Any, Any]:
    """transformers' causal masks [1, S, S]: which may be seen, and what is added."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None]
    return seen, torch.zeros(1, length, length, dtype=torch.float64).masked_fill(~seen, float("-inf"))


def index_weights(module: Any) -> list[Any]:
    norm = module.k_norm
    return [n(w) for w in (module.wq_b.weight, module.wk.weight, norm.weight, norm.bias, module.weights_proj.weight)]


class Noted:
    """The scores of the module's own top-k, as it takes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        topk = torch.Tensor.topk

        def note(scores: Any, *args: Any, **kwargs: Any) -> Any:
            self.scores = scores
            return topk(scores, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "topk", note)


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize(("length", "k"), [(40, 16), (16, 16), (7, 16), (40, 1)])
def test_indexer(
    length: int, k: int, boolean: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(index_topk=k)
    module = filled(hf.GlmMoeDsaIndexer(config, 0), rng)
    h, qr = rng.standard_normal((length, 96)), rng.standard_normal((length, 56))
    batch, noted = one_request(length), Noted(monkeypatch)
    mask = masks(length)[0 if boolean else 1]
    chosen = module(t(h)[None], t(qr)[None], rotary(config, batch.positions), mask, None)[0]
    spec = PagesSpec((("k", 32),), "float32", -(-length // 4), 4)
    empty = Pages(spec, {"k": np.zeros((spec.slots, 32))})
    iq, w, keys = REF["index_prolog"](qr, h, *index_weights(module), empty, batch, theta=1e6, width=8, eps=1e-6)
    scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
    scores = REF["indexer_scores"](iq, w, keys, batch, scale=scale)
    expected = n(noted.scores[0]).astype(float)
    np.testing.assert_array_equal(np.isneginf(scores), np.isneginf(expected))
    seen = np.isfinite(scores)
    close(scores[seen], expected[seen], 1e-5)
    indices, count = REF["indexer_topk"](iq, w, keys, batch, k=k, scale=scale).native
    np.testing.assert_array_equal(count, np.minimum(np.arange(length) + 1, k))
    for row in range(length):  # transformers fills up with hidden positions, which the causal mask removes again
        theirs = {int(s) for s in chosen[row] if s <= row}
        assert {int(s) for s in indices[row, : count[row]]} == theirs
        assert (indices[row, count[row] :] == -1).all()


@pytest.mark.parametrize(("length", "k"), [(30, 8), (8, 16)])
def test_absorbed_attention_equals_expanded_attention(length: int, k: int, rng: np.random.Generator) -> None:
    """The whole attention module: prolog, indexer, sparse attention over the latent cache, output."""
    config = config_of(index_topk=k)
    module = filled(hf.GlmMoeDsaAttention(config, 0), rng)
    module.q_a_layernorm.variance_epsilon = module.kv_a_layernorm.variance_epsilon = 1e-5
    h, batch = rng.standard_normal((length, 96)), one_request(length)
    _, mask = masks(length)
    out, _, _ = module(t(h)[None], rotary(config, batch.positions), mask[:, None])
    heads, nope, value, latent, width = 4, 24, 40, 32, 8
    kv_b = n(module.kv_b_proj.weight).reshape(heads, nope + value, latent)
    w_uk, w_uv = kv_b[:, :nope].transpose(0, 2, 1), kv_b[:, nope:]
    blocks = -(-length // 4)
    kv_spec = PagesSpec((("c", latent), ("kp", width)), "float32", blocks, 4)
    kv = Pages(kv_spec, {f: np.zeros((kv_spec.slots, size)) for f, size in kv_spec.fields})
    weights = (
        module.q_a_proj.weight,
        module.q_a_layernorm.weight,
        module.q_b_proj.weight,
        module.kv_a_proj_with_mqa.weight,
        module.kv_a_layernorm.weight,
    )
    q_latent, q_rope, qr, kv = REF["mla_prolog"](h, *map(n, weights), w_uk, kv, batch, theta=1e6, eps=1e-5)
    close(qr, n(module.q_a_layernorm(module.q_a_proj(t(h)))), SINGLE)
    inner = index_weights(module.indexer)
    spec = PagesSpec((("k", 32),), "float32", blocks, 4)
    empty = Pages(spec, {"k": np.zeros((spec.slots, 32))})
    iq, w, keys = REF["index_prolog"](qr, h, *inner, empty, batch, theta=1e6, width=width, eps=1e-6)
    sel = REF["indexer_topk"](iq, w, keys, batch, k=k, scale=32**-0.5 * 8**-0.5)
    o = REF["sparse_mla"](q_latent, q_rope, kv, sel, batch, scale=(nope + width) ** -0.5)
    assert module.scaling == (nope + width) ** -0.5
    close(REF["mla_output"](o, w_uv, n(module.o_proj.weight)), n(out[0]), 1e-5)
