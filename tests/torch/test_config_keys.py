"""Every key of config.json, dropped and changed: the logits are those of transformers, or a sentence names the key.

Weights are a function of their name and shape, on both sides, so that a config with other sizes is another whole model.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.23")

from porthal import Binding, UsageError  # noqa: E402
from porthal.model import Config, Glm5  # noqa: E402
from porthal.model.config import KEYS, REQUIRED  # noqa: E402
from tests.oracles import published, tiny  # noqa: E402

SIZES = {key for key, rule in KEYS.items() if rule.default is REQUIRED}
HARMLESS = {key for key, rule in KEYS.items() if not rule.expected}
NUMBERS = {"rms_norm_eps", "routed_scaling_factor"}  # for which transformers refuses 1 and takes 1.0
# What does not fit, in sentences about a list or the prompt.
SHOWN = {"num_hidden_layers": "layers", "vocab_size": "token", "max_position_embeddings": "context"}
TOKENS = tiny.PROMPT[:28]  # more than index_topk
TOLERANCE = 1e-4  # logits have a standard deviation near 1
VISIBLE = 1e-2
STATED = {"num_experts": 8, "mlp_bias": False, "partial_rotary_factor": 1.0}
BASES: dict[str, dict[str, Any]] = {
    "glm5": {**published.GLM5, **tiny.CONFIG},
    "glm52": {**published.GLM52, **tiny.CONFIG, **tiny.GLM52, **STATED},
}
# What a key may be set to by mistake, or in earnest.
OTHER = (None, True, False, 0, 1, 2, 3, -1, 0.5, float("nan"), float("inf"), "", "x", "8", [], [1], {}, {"x": 1})
OTHERS: dict[str, tuple[Any, ...]] = {
    "index_topk_pattern": ("FSFS", "FFSS", "FFFFS", "SFFF", "FFF", "fsfs", ["full", "shared", "full", "full"], ["F"] * 4),
    "indexer_types": (["full", "full", "full", "shared"], ["shared"] * 4, ["full"] * 3, [["full"]] * 4, "FSFS"),
    "mlp_layer_types": (["dense"] * 4, ["sparse"] * 4, ["sparse", "dense"] * 2, ["dense"] * 3, ["moe"] * 4),
    "layer_types": (["indexed_attention"] * 4, ["full_attention"] * 4, ["indexed_attention"] * 3),
    "hidden_act": ("gelu", "relu"),
    "scoring_func": ("softmax",),
    "topk_method": ("greedy",),
    "routed_scaling_factor": (1.7,),
    "rms_norm_eps": (1e-3, 1e-6),
    "initializer_range": (0.5,),
    "dtype": ("bfloat16",),
    "attention_dropout": (0.5,),
    "use_cache": (False,),
    "ep_size": (8,),
    "pretraining_tp": (2,),
    "pad_token_id": (None, 3, 1000),
    "bos_token_id": (3, None),
    "output_router_logits": (True,),
    "chunk_size_feed_forward": (4,),
    "head_dim": (8, 64, 192),
    "n_group": (4, 8),
    "n_routed_experts": (12, 4),
    "num_experts_per_tok": (8, 9),
    "qk_rope_head_dim": (16, 32, 34),
    "index_topk": (4, 28, 4096),
    "hidden_size": (64,),
    "num_hidden_layers": (5,),
    "eos_token_id": ([154, -1], ["a"], [[1]], "154"),
    "rope_scaling": (
        {"rope_type": "default", "rope_theta": 1e5},
        {"type": "default", "rope_theta": 1e5},
        {"type": "default"},
        {"type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "default", "rope_theta": "big"},
        {"rope_type": None},
    ),
    "rope_parameters": (
        {"rope_theta": 1e5},
        {"rope_type": "default"},
        {"rope_type": "default", "rope_theta": None},
        {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 128},
        {"indexed_attention": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "rope_theta": (1e5,),
    "quantization_config": ({"quant_method": "awq"}, {"quant_method": "fp8", "weight_block_size": [0, 128]}, {"fmt": "e4m3"}),
    "num_key_value_heads": (2, 8),
    "num_experts": (4,),
    "num_local_experts": (4,),
    "per_layer_config": ({"1": {"index_topk": 4}},),
}
# Several keys at once; None: without the key.
TOGETHER: dict[str, dict[str, Any]] = {
    "rope_theta at the top": {"rope_parameters": None, "rope_theta": 1e5},
    "rope_theta in rope_scaling": {"rope_parameters": None, "rope_scaling": {"rope_type": "default", "rope_theta": 1e5}},
    "rope_theta at the top, rope_scaling without": {"rope_theta": 1e5, "rope_scaling": {"type": "default"}},
    "rope_theta nowhere": {"rope_parameters": None},
    "frequency alone": {"indexer_types": None, "index_skip_topk_offset": None, "index_topk_freq": 2},
    "frequency and offset": {"indexer_types": None, "index_skip_topk_offset": 3, "index_topk_freq": 2},
    "offset alone": {"indexer_types": None, "index_topk_freq": None, "index_skip_topk_offset": 4},
    "nothing of indexers": {"indexer_types": None, "index_topk_freq": None, "index_skip_topk_offset": None},
    "pattern": {"indexer_types": None, "index_topk_pattern": "FSSF"},
    "pattern beside frequency": {"indexer_types": None, "index_topk_pattern": "FFFS", "index_topk_freq": 2},
    "dense layers by number": {"mlp_layer_types": None, "first_k_dense_replace": 2},
    "more dense layers than layers": {"mlp_layer_types": None, "first_k_dense_replace": 7},
    "groups": {"n_group": 4, "topk_group": 2},
    "tied": {"tie_word_embeddings": True, "routed_scaling_factor": None},
}


@cache
def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng([7, zlib.crc32(name.encode())])
    if len(shape) == 1:
        spread = {"correction_bias": 0.2, "norm.bias": 0.3}
        return rng.normal(*next(((0, s) for end, s in spread.items() if name.endswith(end)), (1, 0.25)), shape)
    gain = 0.05 if "_a_proj" in name else 1.5 if "embed" in name or "q_b" in name else 1.0  # so that latents' eps matters
    return gain * rng.normal(0, 1 if "embed" in name else shape[-1] ** -0.5, shape)


class Drawn:
    """A source of whatever is asked for, without an MTP layer, and with fused experts."""

    def holds(self, prefix: str) -> bool:
        return prefix.endswith("experts.gate_up_proj")

    def read(self, name: str, shape: Sequence[int], rows: slice) -> np.ndarray:
        return draw(name, tuple(shape)).astype(np.float32)[rows]


@cache
def answer(config: Config, binding: Binding) -> np.ndarray:
    return Glm5(config, Drawn(), binding).forward(TOKENS)


def ours(raw: dict[str, Any], binding: Binding) -> np.ndarray:
    return answer(Config.parse(raw, "config.json"), binding)


def theirs(raw: dict[str, Any]) -> np.ndarray | None:
    """transformers' logits, or None where it has none."""
    try:
        given = {k: dict(v) if isinstance(v, dict) else float(v) if k in NUMBERS else v for k, v in raw.items()}
        config = transformers.GlmMoeDsaConfig(**given)
        config._attn_implementation = "eager"
        model = transformers.GlmMoeDsaForCausalLM(config).float().eval()
        with torch.no_grad():
            for name, values in model.state_dict().items():
                if name != "lm_head.weight" or not config.tie_word_embeddings:
                    values.copy_(torch.from_numpy(draw(name, tuple(values.shape))))
            return model(torch.tensor([TOKENS])).logits[0].numpy()
    except Exception:
        return None


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, reference: Binding) -> tuple[dict[str, Any], np.ndarray]:
    raw = BASES[request.param]
    logits = ours(raw, reference)
    assert np.abs(logits - theirs(raw)).max() < TOLERANCE
    return raw, logits


def check(raw: dict[str, Any], usual: np.ndarray, keys: Sequence[str], binding: Binding) -> str:
    """"right", "refused" in a sentence that names one of the keys; where transformers has no answer "harmless" or "a size"."""
    try:
        logits = ours(raw, binding)
    except UsageError as error:
        text = str(error)
        assert "\n" not in text
        assert any(key in text or SHOWN.get(key, key) in text for key in keys), text
        return "refused"
    expected = theirs(raw)
    if expected is None and keys[0] in SIZES:
        return "a size"
    changed = {key: raw.get(key, "absent") for key in keys}
    assert np.abs(logits - (usual if expected is None else expected)).max() < TOLERANCE, changed
    return "harmless" if expected is None else "right"


def values(key: str, raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {k: v for k, v in raw.items() if k != key}
    for value in (*((False, True, 2, 4) if key in HARMLESS else OTHER), *OTHERS.get(key, ())):
        if key != "index_n_heads" or value not in (1, 2, 3):  # scores of few heads tie at zero, where both choose freely
            yield raw | {key: value}


@pytest.mark.parametrize("key", sorted(KEYS.keys() - {"latent_norm_eps"}))
def test_a_key_means_what_it_means_to_transformers(key: str, reference: Binding) -> None:
    raw = BASES["glm52"]
    usual = ours(raw, reference)
    for changed in values(key, raw):
        check(changed, usual, [key], reference)


@pytest.mark.parametrize("keys", TOGETHER.values(), ids=TOGETHER)
def test_keys_together(base: tuple[dict[str, Any], np.ndarray], keys: dict[str, Any], reference: Binding) -> None:
    raw, usual = base
    changed = {k: v for k, v in (raw | keys).items() if k not in keys or v is not None}
    assert check(changed, usual, list(keys), reference) == "right"
    if "index_topk_freq" not in keys or keys["index_topk_freq"] or "indexer_types" in raw:  # else all layers select anyway
        assert np.abs(ours(changed, reference) - usual).max() > VISIBLE


def test_the_table_has_every_key_of_transformers() -> None:
    assert {field.name for field in fields(transformers.GlmMoeDsaConfig)} <= KEYS.keys()


def test_defaults_are_those_of_transformers() -> None:
    theirs = {f.name: f.default for f in fields(transformers.GlmMoeDsaConfig) if f.default is not MISSING}
    own = {k: rule.default for k, rule in KEYS.items() if k not in SIZES | HARMLESS}
    # Not taken: sizes, which must be stated; the end of a text; and how many layers are dense, which also must be stated.
    assert {k: v for k, v in own.items() if v != theirs.get(k, v)} == {
        "eos_token_id": None,
        "first_k_dense_replace": None,
        "num_key_value_heads": None,
    }
