"""config.json of GLM-5, GLM-5.1 and the IndexShare variants 5.2 and 5.3, read into what the forward pass needs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NamedTuple

from porthal.hal import UsageError, note
from porthal.hal.scheme import KEYS as INDEX_KEYS
from porthal.hal.scheme import LATENTS, NONE
from porthal.hal.spans import EPSILON, ROUTED, THETA, Reals
from porthal.model.sampling import GREEDY, HOTTEST, Sampling

MODEL_TYPE = "glm_moe_dsa"
REQUIRED = object()


class Rule(NamedTuple):
    """What a written key may hold, judged with the keys above it in its table, and what its absence means."""

    expected: str
    accepts: Callable[[Any, Mapping[str, Any]], bool]
    default: Any = REQUIRED


def _is_whole(value: Any, low: int = 1) -> bool:
    return type(value) is int and value >= low


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _whole(low: int, default: Any = REQUIRED) -> Rule:
    return Rule(f"expected a whole number of at least {low}", lambda v, _: _is_whole(v, low), default)


def _number(default: Any, legal: Reals) -> Rule:
    return Rule(f"expected a number from {legal}", lambda v, _: _is_number(v) and v in legal, default)


def _flag(default: bool) -> Rule:
    return Rule("expected true or false", lambda v, _: type(v) is bool, default)


def _only(value: Any, *unstated: Any) -> Rule:
    """A key that would change the formula: one value of it is implemented, which it has where it is not stated."""
    same = [(type(v), v) for v in (value, *unstated)]
    return Rule(f"porthal implements {value!r} only", lambda v, _: (type(v), v) in same, value)


def _sum(*keys: str) -> Rule:
    """A key that says again what others say."""
    expected = "expected {" + "} + {".join(keys) + "}, " + " + ".join(keys)
    return Rule(expected, lambda v, c: v is None or (_is_whole(v) and v == sum(c[k] for k in keys)), None)


def _layers(*kinds: str, first: str = "") -> Rule:
    """None, or a list of one of these kinds per layer."""
    expected = "expected " + " or ".join(map(repr, kinds)) + " for each of {num_hidden_layers} layers"

    def accepts(value: Any, config: Mapping[str, Any]) -> bool:
        return value is None or (
            isinstance(value, list)
            and len(value) >= config["num_hidden_layers"]
            and all(kind in kinds for kind in value)
            and first in ("", value[0])
        )

    return Rule(expected + (f", the first {first}" if first else ""), accepts, None)


INDEXERS = _layers("full", "shared", first="full")
PATTERN = Rule(
    INDEXERS.expected + ", or as many letters F and S",
    lambda v, c: INDEXERS.accepts(_unfolded(v) if isinstance(v, str) else v, c),
    None,
)
EOS = Rule(
    "expected token ids below {vocab_size}, vocab_size: one, or a list of them",
    lambda v, c: all(_is_whole(i, 0) and i < c["vocab_size"] for i in _listed(v)),
    None,
)
OBJECT = Rule("expected an object", lambda v, _: v is None or isinstance(v, dict), None)
HARMLESS = Rule("", lambda v, _: True, None)
BLOCK = Rule(
    "expected two whole numbers above 0",
    lambda v, _: isinstance(v, (list, tuple)) and len(v) == 2 and all(map(_is_whole, v)),
    (128, 128),
)


def _up_to(high: float, expected: str) -> Rule:
    """None, or a number from 0 on."""
    return Rule(expected, lambda v, _: v is None or (type(v) in (int, float) and 0 <= v <= high), None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


# Every key that transformers' GlmMoeDsaConfig or a published config has. Defaults are those of transformers, but sizes have
# none: one that does not fit the file would blame a tensor.
KEYS: dict[str, Rule] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"), _whole(1)),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank"), _whole(1)),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim", "index_topk"), _whole(1)),
    **dict.fromkeys(("n_routed_experts", "n_shared_experts", "max_position_embeddings"), _whole(1)),
    "qk_rope_head_dim": Rule(  # also the rope frequencies' dim
        "expected an even number up to {index_head_dim}, index_head_dim",
        lambda v, c: _is_whole(v) and v % 2 == 0 and v <= c["index_head_dim"],
    ),
    "n_group": Rule(
        "expected 1, or to divide {n_routed_experts}, n_routed_experts, into groups of at least 2",
        lambda v, c: _is_whole(v) and (v == 1 or (c["n_routed_experts"] % v == 0 and c["n_routed_experts"] >= 2 * v)),
        1,
    ),
    "topk_group": Rule(
        "expected a whole number from 1 to {n_group}, n_group", lambda v, c: _is_whole(v) and v <= c["n_group"], 1
    ),
    "num_experts_per_tok": Rule(
        "expected a whole number of at most {n_routed_experts}, n_routed_experts, in {topk_group} of {n_group} groups",
        lambda v, c: _is_whole(v) and v <= c["n_routed_experts"] // c["n_group"] * c["topk_group"],
    ),
    "rms_norm_eps": _number(1e-5, EPSILON),
    "latent_norm_eps": _number(None, EPSILON),
    "routed_scaling_factor": _number(2.5, ROUTED),
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "rope_theta": _number(10000.0, THETA),
    "indexer_types": INDEXERS,
    "index_topk_pattern": PATTERN,
    "index_topk_freq": _whole(1, 1),
    "index_skip_topk_offset": _whole(0, 2),
    "mlp_layer_types": _layers("dense", "sparse"),
    "first_k_dense_replace": _whole(0, None),
    "tie_word_embeddings": _flag(False),
    "num_nextn_predict_layers": Rule("expected 0 or 1", lambda v, _: type(v) is int and v in (0, 1), 0),
    "index_share_for_mtp_iteration": _flag(False),
    "eos_token_id": EOS,
    "quantization_config": OBJECT,
    # Implemented for one value.
    "hidden_act": _only("silu"),
    "scoring_func": _only("sigmoid"),
    "topk_method": _only("noaux_tc"),
    "norm_topk_prob": _only(True),
    "moe_layer_freq": _only(1),
    "moe_router_dtype": _only("float32", None),
    "attention_bias": _only(False),
    "mlp_bias": _only(False),
    "rope_interleave": _only(True),
    "indexer_rope_interleave": _only(True),
    "partial_rotary_factor": _only(1.0, 1, None),
    "layer_types": _layers("deepseek_sparse_attention", "indexed_attention"),
    "per_layer_config": _only(None, {}),
    # Say again what others say.
    "num_key_value_heads": _sum("num_attention_heads"),
    "qk_head_dim": _sum("qk_nope_head_dim", "qk_rope_head_dim"),
    "num_experts": _sum("n_routed_experts"),
    "num_local_experts": _sum("n_routed_experts"),
    # Change no logits.
    **dict.fromkeys(("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"), HARMLESS),
    **dict.fromkeys(("name_or_path", "dtype", "torch_dtype", "initializer_range", "attention_dropout"), HARMLESS),
    **dict.fromkeys(("head_dim", "use_cache", "ep_size", "pretraining_tp", "pad_token_id", "bos_token_id"), HARMLESS),
    **dict.fromkeys(("output_router_logits", "output_hidden_states", "output_attentions", "return_dict"), HARMLESS),
    **dict.fromkeys(("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type"), HARMLESS),
}
# Under rope_parameters, or rope_scaling in older files, where `type` is the older name of rope_type.
ROPE: dict[str, Rule] = {"rope_type": _only("default"), "type": _only("default"), "rope_theta": _number(None, THETA)}
# Of quantization_config, by its quant_method. Which matrices are quantised, and how, is told by the tensors in the checkpoint:
# published lists name modules that do not exist.
NAMES = ("modules_to_not_convert", "modules_to_convert", "ignored_layers", "ignore", "dequantize", "producer", "config_groups")
QUANTIZATION: dict[str, dict[str, Rule]] = {
    "fp8": {
        "fmt": _only("e4m3"),
        "activation_scheme": _only("dynamic"),
        "scale_fmt": _only("float", None),
        "expert_dtype": _only("fp8", None),
        "weight_block_size": BLOCK,
        **dict.fromkeys(NAMES, HARMLESS),
    },
    "compressed-tensors": {
        "quantization_status": _only("compressed", None),
        "sparsity_config": _only(None, {}),
        "transform_config": _only(None, {}),
        "config_groups": OBJECT,
        **dict.fromkeys(("format", "version", "global_compression_ratio", "ignore", "kv_cache_scheme"), HARMLESS),
    },
    "modelopt": {
        "weight_block_size": BLOCK,
        **dict.fromkeys(("quant_algo", "group_size", "exclude_modules", "kv_cache_quant_algo", "kv_cache_scheme"), HARMLESS),
        **dict.fromkeys(NAMES, HARMLESS),
    },
    "quark": {
        "algo_config": _only(None, []),
        **dict.fromkeys(("export", "global_quant_config", "layer_quant_config", "layer_type_quant_config"), HARMLESS),
        **dict.fromkeys(("exclude", "kv_cache_quant_config", "softmax_quant_spec", "quant_mode", "version"), HARMLESS),
    },
    "torchao": {
        **dict.fromkeys(("quant_type", "include_input_output_embeddings", "untie_embedding_weights"), HARMLESS),
        **dict.fromkeys(NAMES, HARMLESS),
    },
}
# Of AscendV1's quant_model_description.json: how it calls what `model.quantised` reads.
ASCEND = (
    *("FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W4A8_DYNAMIC", "W4A4_DYNAMIC", "WFP8AFP8_DYNAMIC"),
    *("W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4", "C8"),
)
# Of generation_config.json; its other keys are told as not read.
GENERATION: dict[str, Rule] = {
    **dict.fromkeys(("vocab_size", "pad_token_id", "bos_token_id", "transformers_version", "_from_model_config"), HARMLESS),
    "eos_token_id": EOS,
    "do_sample": Rule("expected true or false", lambda v, _: v is None or type(v) is bool, None),
    "temperature": _up_to(HOTTEST, "expected a number of at least 0"),
    "top_p": _up_to(1, "expected a number from 0 to 1"),
    "top_k": Rule("expected a whole number of at least 0", lambda v, _: v is None or _is_whole(v, 0), None),
}


@dataclass(frozen=True)
class Config:
    """Architecture of a checkpoint; field names are those of config.json.

    rope_theta         from rope_scaling, rope_parameters or the top level; 10000 without any, as in transformers
    latent_norm_eps    eps of q_a_layernorm and kv_a_layernorm: rms_norm_eps, unless the file says otherwise
    indexer_types      per layer "full" (selects for itself) or "shared" (uses the nearest full layer below)
    dense              per layer: dense MLP instead of experts
    eos_token_id       generation_config.json's, where there is one: then it alone says what ends a text, as in transformers
    sampling           how generation_config.json draws: greedy without do_sample, but top_p and top_k are kept. What it
                       leaves out is neutral, while transformers would keep 50 candidates without a top_k
    latents, keys      the schemes of the caches: of each token's latent, and of the indexer's key. No file states them
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    rms_norm_eps: float
    latent_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    eos_token_id: tuple[int, ...]
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    index_share_for_mtp_iteration: bool
    indexer_types: tuple[str, ...]
    dense: tuple[bool, ...]
    fp8_block: tuple[int, int] | None
    sampling: Sampling = GREEDY
    latents: str = NONE
    keys: str = NONE

    @property
    def softmax_scale(self) -> float:
        return float((self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5)

    @property
    def index_scale(self) -> float:
        return float(self.index_n_heads**-0.5 * self.index_head_dim**-0.5)

    @property
    def has_mtp(self) -> bool:
        return self.num_nextn_predict_layers > 0

    def cached(self, schemes: Sequence[str]) -> Config:
        """The same model with caches under these schemes, at most one for each cache; UsageError for others."""
        for name in schemes:
            if name not in (*LATENTS, *INDEX_KEYS):
                raise UsageError(f"a cache's scheme is {name!r}: expected one of {', '.join((*INDEX_KEYS, *LATENTS))}")
        latents, keys = ([name for name in schemes if name in of] for of in (LATENTS, INDEX_KEYS))
        for cache, given in (("latents", latents), ("keys", keys)):
            if given[1:]:
                raise UsageError(f"the cache of {cache} has the schemes {' and '.join(given)}: expected one of them")
        return replace(self, latents=(*latents, self.latents)[0], keys=(*keys, self.keys)[0])

    def shallow(self) -> Config:
        """The same model with one layer of each kind: it makes every call that all of them make."""
        kinds = list(zip(self.dense, self.indexer_types))
        kept = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
        dense, types = tuple(self.dense[i] for i in kept), tuple(self.indexer_types[i] for i in kept)
        return replace(self, num_hidden_layers=len(kept), dense=dense, indexer_types=types)

    @classmethod
    def read(cls, directory: str | Path) -> Config:
        """From a directory's config.json, and generation_config.json where there is one; UsageError names the key that is
        missing or not supported."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise UsageError(
                f"{path} does not exist: expected a model directory with config.json and safetensors files"
            )
        config = cls.parse(_object(path), str(path))
        beside = path.with_name("generation_config.json")
        return _generating(config, _object(beside), str(beside)) if os.path.lexists(beside) else config

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str = "config") -> Config:
        """From the values of config.json; a line on stderr names the keys that porthal does not know."""
        if raw.get("model_type") != MODEL_TYPE:
            raise UsageError(
                f"{where} has model_type {raw.get('model_type')!r}: porthal runs {MODEL_TYPE!r} (GLM-5, 5.1, 5.2, 5.3)"
            )
        c, unknown = _judged(raw, KEYS, where)
        block = None
        if c["quantization_config"]:
            block, more = _quantised(c["quantization_config"], where)
            unknown += more
        found = c | {
            "rms_norm_eps": float(c["rms_norm_eps"]),
            "latent_norm_eps": float(c["latent_norm_eps"] or c["rms_norm_eps"]),
            "routed_scaling_factor": float(c["routed_scaling_factor"]),
            "rope_theta": _rope_theta(c, where),
            "eos_token_id": tuple(_listed(c["eos_token_id"])),
            "indexer_types": _indexer_types(c, where),
            "dense": _dense_layers(c, where),
            "fp8_block": block,
        }
        if unknown:
            note(
                f"{where} has {', '.join(unknown)}, unknown to porthal and not used: "
                "if that changes the formula, this is another model"
            )
        return cls(**{field.name: found[field.name] for field in fields(cls) if field.name in found})


def _quantised(raw: dict[str, Any], where: str) -> tuple[tuple[int, int], list[str]]:
    """The rows and columns of a block that shares a scale, and the keys that are not known."""
    method, prefix = raw.get("quant_method"), "quantization_config."
    if method not in QUANTIZATION:
        raise UsageError(f"{where} has {prefix}quant_method = {shown(method)}: expected one of {', '.join(QUANTIZATION)}")
    found, unknown = _judged({k: v for k, v in raw.items() if k != "quant_method"}, QUANTIZATION[method], where, prefix)
    block = found.get("weight_block_size", BLOCK.default)
    for name, group in (found["config_groups"] or {}).items() if method == "compressed-tensors" else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("block_structure") is not None:
            rule = {"block_structure": BLOCK}
            block = _judged(weights, rule, where, f"{prefix}config_groups.{name}.weights.")[0]["block_structure"]
    return (block[0], block[1]), unknown


def described(directory: str | Path) -> dict[str, str]:
    """What AscendV1's description says of each tensor, {} where there is none. UsageError where porthal does not read that."""
    path = Path(directory) / "quant_model_description.json"
    if not os.path.lexists(path):
        return {}
    raw = _object(path)
    rotated = raw.get("metadata")
    if isinstance(rotated, dict) and rotated.get("quarot"):
        raise UsageError(f"{path} has metadata.quarot: porthal does not rotate activations, take weights without rotation")
    for name, kind in raw.items():
        if "." in name and kind not in ASCEND:
            raise UsageError(f"{path} has {name!r} = {shown(kind)}: expected one of {', '.join(ASCEND)}")
    return {name: kind for name, kind in raw.items() if "." in name}


def _object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} is a {type(raw).__name__}: expected a JSON object")
    return raw


def _generating(config: Config, raw: dict[str, Any], where: str) -> Config:
    c, unread = _judged(raw | {"vocab_size": config.vocab_size}, GENERATION, where)
    if unread:
        note(f"{where}: not read: {', '.join(unread)}")
    heat, top_p = (1.0 if c[key] is None else float(c[key]) for key in ("temperature", "top_p"))
    sampling = Sampling(heat if c["do_sample"] else 0.0, top_p, c["top_k"] or 0)
    return replace(config, eos_token_id=tuple(_listed(c["eos_token_id"])), sampling=sampling)


def _judged(
    raw: dict[str, Any], table: dict[str, Rule], where: str, prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """The values of the table's keys, and the keys that are not in the table but hold something."""
    found: dict[str, Any] = {}
    for key, rule in table.items():
        found[key] = raw.get(key, rule.default)
        if found[key] is REQUIRED or (key in raw and not rule.accepts(raw[key], found)):
            has = f"has {prefix}{key} = {shown(raw[key])}" if key in raw else f"has no {prefix}{key}"
            raise UsageError(f"{where} {has}: {rule.expected.format_map(found)}")
    return found, [prefix + key for key, value in raw.items() if key not in table and value]


def _rope_theta(c: dict[str, Any], where: str) -> float:
    """As transformers: rope_scaling, where it holds something, replaces rope_parameters."""
    name = "rope_scaling" if c["rope_scaling"] else "rope_parameters"
    rope, unknown = _judged(c[name] or {}, ROPE, where, name + ".")
    if unknown:
        raise UsageError(f"{where} has {unknown[0]}: porthal implements rotary embeddings with rope_theta alone")
    return float(rope["rope_theta"] or c["rope_theta"])


def _unfolded(pattern: str) -> list[str]:
    return [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]


def _indexer_types(c: dict[str, Any], where: str) -> tuple[str, ...]:
    """The list, else the pattern, else the rule: layer i is full iff max(i - offset + 1, 0) mod freq == 0."""
    layers, given, pattern = c["num_hidden_layers"], c["indexer_types"], c["index_topk_pattern"]
    if given is None and pattern is not None:
        given = _unfolded(pattern) if isinstance(pattern, str) else pattern
    if given is None:
        freq, offset = c["index_topk_freq"], c["index_skip_topk_offset"]
        if freq > 1 and offset < 1:
            raise UsageError(
                f"{where} has index_skip_topk_offset = {offset}: expected at least 1 with index_topk_freq = {freq}, "
                "so that the first layer selects"
            )
        given = ["full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(layers)]
    return tuple(given[:layers])


def _dense_layers(c: dict[str, Any], where: str) -> tuple[bool, ...]:
    """The list where the file has one, else the first first_k_dense_replace layers."""
    kinds, first, layers = c["mlp_layer_types"], c["first_k_dense_replace"], c["num_hidden_layers"]
    if kinds is not None:
        return tuple(kind == "dense" for kind in kinds[:layers])
    if first is None:
        raise UsageError(f"{where} has neither first_k_dense_replace nor mlp_layer_types: say which layers are dense")
    return tuple(i < first for i in range(layers))
