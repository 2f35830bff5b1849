"""config.json of GLM-5, GLM-5.1 and the IndexShare variants 5.2 and 5.3, read into what the forward pass needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porthal.hal import UsageError

MODEL_TYPE = "glm_moe_dsa"


@dataclass(frozen=True)
class Config:
    """Architecture of a checkpoint; field names are those of config.json.

    rope_theta         from rope_parameters or the top level; 10000 without either, as in transformers
    latent_norm_eps    eps of q_a_layernorm and kv_a_layernorm: rms_norm_eps, unless the file says otherwise
    indexer_types      per layer "full" (selects for itself) or "shared" (uses the nearest full layer below)
    dense              per layer: dense MLP instead of experts
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

    @property
    def softmax_scale(self) -> float:
        return float((self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5)

    @property
    def index_scale(self) -> float:
        return float(self.index_n_heads**-0.5 * self.index_head_dim**-0.5)

    @property
    def has_mtp(self) -> bool:
        return self.num_nextn_predict_layers > 0

    @classmethod
    def read(cls, directory: str | Path) -> Config:
        """From a directory's config.json; UsageError names the key that is missing or not supported."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise UsageError(
                f"{path} does not exist: expected a model directory with config.json and safetensors files"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise UsageError(f"{path} is a {type(raw).__name__}: expected a JSON object")
        return cls.parse(raw, str(path))

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str = "config") -> Config:
        if raw.get("model_type") != MODEL_TYPE:
            raise UsageError(
                f"{where} has model_type {raw.get('model_type')!r}: porthal runs {MODEL_TYPE!r} (GLM-5, 5.1, 5.2, 5.3)"
            )
        _refuse_unsupported(raw, where)

        def whole(key: str, default: int | None = None, low: int = 1) -> int:
            value = raw.get(key, default)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UsageError(f"{where} has {key} = {value!r}: expected a whole number of at least {low}")
            return value

        def positive(key: str, value: Any) -> float:
            if not isinstance(value, (int, float)) or not value > 0:
                raise UsageError(f"{where} has {key} = {value!r}: expected a number above 0")
            return float(value)

        layers = whole("num_hidden_layers")
        eps = positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-5))
        eos = raw.get("eos_token_id", ())
        rope = raw.get("rope_parameters") or {}
        block = (raw.get("quantization_config") or {}).get("weight_block_size")
        config = cls(
            vocab_size=whole("vocab_size"),
            hidden_size=whole("hidden_size"),
            intermediate_size=whole("intermediate_size"),
            moe_intermediate_size=whole("moe_intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=whole("num_attention_heads"),
            q_lora_rank=whole("q_lora_rank"),
            kv_lora_rank=whole("kv_lora_rank"),
            qk_nope_head_dim=whole("qk_nope_head_dim"),
            qk_rope_head_dim=whole("qk_rope_head_dim"),  # also the rope frequencies' dim; head_dim is misleading
            v_head_dim=whole("v_head_dim"),
            index_n_heads=whole("index_n_heads"),
            index_head_dim=whole("index_head_dim"),
            index_topk=whole("index_topk"),
            n_routed_experts=whole("n_routed_experts"),
            num_experts_per_tok=whole("num_experts_per_tok"),
            n_shared_experts=whole("n_shared_experts", 1),
            n_group=whole("n_group", 1),
            topk_group=whole("topk_group", 1),
            routed_scaling_factor=positive("routed_scaling_factor", raw.get("routed_scaling_factor", 1.0)),
            rms_norm_eps=eps,
            latent_norm_eps=positive("latent_norm_eps", raw.get("latent_norm_eps", eps)),
            rope_theta=positive("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            max_position_embeddings=whole("max_position_embeddings"),
            eos_token_id=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            num_nextn_predict_layers=whole("num_nextn_predict_layers", 0, low=0),
            index_share_for_mtp_iteration=bool(raw.get("index_share_for_mtp_iteration", False)),
            indexer_types=_indexer_types(raw, layers, where),
            dense=_dense_layers(raw, layers, where),
            fp8_block=(int(block[0]), int(block[1])) if block else None,
        )
        if config.num_experts_per_tok > config.n_routed_experts:
            raise UsageError(
                f"{where} has num_experts_per_tok = {config.num_experts_per_tok}: "
                f"expected at most {config.n_routed_experts}, n_routed_experts"
            )
        return config


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    """Keys that would change the formula: refuse what is not implemented instead of ignoring it."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    supported: dict[str, tuple[Any, Any]] = {
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "scoring_func": (raw.get("scoring_func", "sigmoid"), "sigmoid"),
        "norm_topk_prob": (raw.get("norm_topk_prob", True), True),
        "attention_bias": (raw.get("attention_bias", False), False),
        "rope_interleave": (raw.get("rope_interleave", True), True),
        "indexer_rope_interleave": (raw.get("indexer_rope_interleave", True), True),
        "rope_parameters.rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for key, (value, wanted) in supported.items():
        if value != wanted:
            raise UsageError(f"{where} has {key} = {value!r}: porthal implements {wanted!r} only")
    quantization = raw.get("quantization_config")
    if not quantization:
        return
    if quantization.get("quant_method") != "fp8":
        raise UsageError(
            f"{where} has quant_method {quantization.get('quant_method')!r}: porthal reads block-scaled 'fp8'"
        )
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
        raise UsageError(f"{where} has weight_block_size {block!r}: expected two whole numbers above 0")


def _indexer_types(raw: dict[str, Any], layers: int, where: str) -> tuple[str, ...]:
    """The list where the file has one, else the rule: layer i is full iff max(i - offset + 1, 0) mod freq == 0."""
    given = raw.get("indexer_types")
    if given is None:
        freq, offset = raw.get("index_topk_freq") or 1, raw.get("index_skip_topk_offset") or 0
        given = ["full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(layers)]
    if len(given) < layers or given[0] != "full" or not set(given) <= {"full", "shared"}:
        raise UsageError(
            f"{where} has indexer_types {given!r}: expected 'full' or 'shared' for each of {layers} layers, the first full"
        )
    return tuple(given[:layers])


def _dense_layers(raw: dict[str, Any], layers: int, where: str) -> tuple[bool, ...]:
    """The list where the file has one, else the first first_k_dense_replace layers."""
    kinds = raw.get("mlp_layer_types")
    if kinds is None:
        return tuple(i < raw.get("first_k_dense_replace", 0) for i in range(layers))
    if len(kinds) < layers or not set(kinds) <= {"dense", "sparse"}:
        raise UsageError(
            f"{where} has mlp_layer_types {kinds!r}: expected 'dense' or 'sparse' for each of {layers} layers"
        )
    return tuple(kind == "dense" for kind in kinds[:layers])
