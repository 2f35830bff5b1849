"""Tiny GLM-5 and GLM-5.2 checkpoints with every structure of the real ones, and transformers' answers on them.

`build` needs only NumPy and safetensors; the `hf_*` functions need transformers 5.23: earlier releases are wrong.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.oracles.transcript import Transcript

Kind = Literal["glm5", "glm52"]
Dtype = Literal["float32", "bfloat16"]

# With these seeds, in float32 and in bfloat16, no top-k of indexer or router over PROMPT and its first 24 greedy tokens
# has a gap below 1e-4, and no arg-max one below 1e-2: rounding in float32 cannot turn a choice.
SEEDS = {"glm5": 47, "glm52": 147}

PROMPT = [int(token) for token in np.random.default_rng(5).integers(0, 160, 96)]

CONFIG: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "float32",
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 128,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 56,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 32,
    "v_head_dim": 40,
    "head_dim": 24,  # misleading, as in released configs: the frequencies belong to qk_rope_head_dim
    "index_n_heads": 8,
    "index_head_dim": 32,
    "index_topk": 16,
    "indexer_rope_interleave": True,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "latent_norm_eps": 1e-6,  # transformers has no such key and always takes 1e-6 for q_a_layernorm and kv_a_layernorm
    "rope_interleave": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "max_position_embeddings": 512,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "eos_token_id": [154, 155, 156],
    "pad_token_id": 154,
}

GLM52: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 8000000.0},
    "index_topk_freq": 4,
    "index_skip_topk_offset": 2,
    "index_topk_pattern": None,
    "indexer_types": ["full", "full", "shared", "shared"],
    "index_share_for_mtp_iteration": True,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "layer_types": ["deepseek_sparse_attention"] * 4,
    "moe_router_dtype": "float32",
}


def _tensors(c: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every tensor under its real name, float32. Norm weights are not 1 and biases not 0: dropping one shows."""
    d, heads, latent, r = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = rng.normal(0, gain * columns**-0.5, (rows, columns))

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = rng.normal(1, 0.25, width)

    def mlp(name: str, width: int) -> None:
        matrix(f"{name}.gate_proj", width, d, 2)
        matrix(f"{name}.up_proj", width, d)
        matrix(f"{name}.down_proj", d, width)

    def block(layer: int, full: bool) -> None:
        name, attention = f"model.layers.{layer}", f"model.layers.{layer}.self_attn"
        norm(f"{name}.input_layernorm", d)
        norm(f"{name}.post_attention_layernorm", d)
        # Latents are small before their norm, so that its epsilon matters.
        matrix(f"{attention}.q_a_proj", c["q_lora_rank"], d, 0.05)
        norm(f"{attention}.q_a_layernorm", c["q_lora_rank"])
        matrix(f"{attention}.q_b_proj", heads * c["qk_head_dim"], c["q_lora_rank"], 1.5)
        matrix(f"{attention}.kv_a_proj_with_mqa", latent + r, d)
        tensors[f"{attention}.kv_a_proj_with_mqa.weight"][:latent] *= 0.05
        norm(f"{attention}.kv_a_layernorm", latent)
        matrix(f"{attention}.kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), latent)
        matrix(f"{attention}.o_proj", d, heads * c["v_head_dim"])
        if full:
            matrix(f"{attention}.indexer.wq_b", index_heads * index_dim, c["q_lora_rank"])
            matrix(f"{attention}.indexer.wk", index_dim, d)
            norm(f"{attention}.indexer.k_norm", index_dim)
            tensors[f"{attention}.indexer.k_norm.bias"] = rng.normal(0, 0.3, index_dim)
            matrix(f"{attention}.indexer.weights_proj", index_heads, d)
        if layer < c["first_k_dense_replace"]:
            mlp(f"{name}.mlp", c["intermediate_size"])
            return
        matrix(f"{name}.mlp.gate", c["n_routed_experts"], d)
        tensors[f"{name}.mlp.gate.e_score_correction_bias"] = rng.normal(0, 0.2, c["n_routed_experts"])
        for expert in range(c["n_routed_experts"]):
            mlp(f"{name}.mlp.experts.{expert}", c["moe_intermediate_size"])
        mlp(f"{name}.mlp.shared_experts", c["moe_intermediate_size"])

    tensors["model.embed_tokens.weight"] = rng.normal(0, 1, (c["vocab_size"], d))
    for layer in range(c["num_hidden_layers"]):
        block(layer, c.get("indexer_types", ["full"] * 4)[layer] == "full")
    norm("model.norm", d)
    matrix("lm_head", c["vocab_size"], d)
    mtp = f"model.layers.{c['num_hidden_layers']}"
    norm(f"{mtp}.enorm", d)
    norm(f"{mtp}.hnorm", d)
    matrix(f"{mtp}.eh_proj", d, 2 * d)
    block(c["num_hidden_layers"], True)
    norm(f"{mtp}.shared_head.norm", d)
    return {name: values.astype(np.float32) for name, values in tensors.items()}


def build(
    directory: str | Path,
    kind: Kind = "glm5",
    seed: int | None = None,
    shards: int = 1,
    dtype: Dtype = "float32",
) -> Path:
    """Write config.json and `shards` safetensors files (with an index when there are several) into `directory`.

    As published, e_score_correction_bias stays float32 in a bfloat16 checkpoint. seed None: SEEDS[kind].
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **(GLM52 if kind == "glm52" else {}), "dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    tensors = _tensors(config, np.random.default_rng(SEEDS[kind] if seed is None else seed))
    if dtype == "bfloat16":
        tensors = {n: t if n.endswith("correction_bias") else t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()}
    names = list(tensors)
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, members in files.items() for name in members},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, directory / file, metadata={"format": "pt"})
    return directory


def smallest_gap(directory: str | Path, tokens: list[int]) -> float:
    """The closest choice of any indexer or router on `tokens` and 3 drafts: last score chosen minus first left out."""
    model = Transcript(directory)
    for index_share in (False, True):
        model.drafts(tokens, hidden=None, steps=3, index_share=index_share, zero_first=False)
    return min(model.gaps)


@lru_cache(maxsize=8)
def hf_model(directory: str | Path) -> Any:
    """transformers' model in float32, kept per directory; refuses missing names, and unknown ones but for the MTP."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    mtp = f"model.layers.{model.config.num_hidden_layers}."
    wrong = set(info["missing_keys"]) | {name for name in info["unexpected_keys"] if not name.startswith(mtp)}
    if wrong:
        raise ValueError(f"transformers misses or does not know {sorted(wrong)} in {directory}")
    return model.eval()


def hf_chunked(directory: str | Path, tokens: list[int], chunks: list[int]) -> np.ndarray:
    """Logits [T, vocab], float32, of feeding `tokens` in chunks of the given lengths through one DynamicCache."""
    return _hf_chunked(directory, tuple(tokens), tuple(chunks))


@lru_cache(maxsize=256)
def _hf_chunked(directory: str | Path, tokens: tuple[int, ...], chunks: tuple[int, ...]) -> np.ndarray:
    import torch
    from transformers import DynamicCache

    model = hf_model(directory)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = torch.tensor([tokens]).split(list(chunks), dim=1)
        logits = torch.cat([model(part, past_key_values=cache, use_cache=True).logits[0] for part in parts]).numpy()
    logits.flags.writeable = False  # every caller has the same
    return logits


def hf_logits(directory: str | Path, tokens: list[int]) -> np.ndarray:
    """Logits [T, vocab], float32, of one full pass."""
    return hf_chunked(directory, tokens, [len(tokens)])


def hf_cached_decode(directory: str | Path, tokens: list[int], start: int) -> np.ndarray:
    """Logits [T, vocab], float32, of a prefill of `start` tokens and then one token at a time."""
    return hf_chunked(directory, tokens, [start] + [1] * (len(tokens) - start))


def hf_greedy(directory: str | Path, tokens: list[int], n: int) -> list[int]:
    """The n most likely next tokens, one after the other; end-of-text tokens do not stop it."""
    tokens = list(tokens)
    for _ in range(n):
        tokens.append(int(hf_logits(directory, tokens)[-1].argmax()))
    return tokens[-n:]


def hf_mtp_drafts(
    directory: str | Path, tokens: list[int], steps: int = 3, index_share: bool = False
) -> tuple[list[int], np.ndarray]:
    """Greedy drafts and their logits [steps, vocab], as `transcript.mtp_drafts`, in float32.

    transformers has no MTP module, but the module's decoder block is an ordinary one: transformers loads it as one more
    layer of the model and runs that layer alone, on rows joined here.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    last = config.num_hidden_layers
    config.num_hidden_layers += 1
    config.indexer_types, config.mlp_layer_types = [*config.indexer_types, "full"], [*config.mlp_layer_types, "sparse"]
    config.layer_types = [*config.layer_types, config.layer_types[-1]]
    module = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    stored: dict[str, Any] = {}
    for path in Path(directory).glob("*.safetensors"):
        stored.update(load_file(path))
    enorm, hnorm, eh_proj, head_norm = (
        torch.tensor(stored[f"model.layers.{last}.{name}.weight"].astype(np.float32))
        for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    )
    module.model.layers = module.model.layers[last:]
    module.config.num_hidden_layers = 1
    indexer = module.model.layers[0].self_attn.indexer
    own_choice = indexer.forward

    def shared_choice(*args: Any, **kwargs: Any) -> Any:
        indices = own_choice(*args, **kwargs)
        indices[:, len(tokens) :] = indices[:, len(tokens) - 1 : len(tokens)]
        return indices

    if index_share:
        indexer.forward = shared_choice
    main, norm, ids, logits = hf_model(directory), torch.nn.functional.rms_norm, [], []
    with torch.no_grad():
        module.model.norm.weight.copy_(head_norm)
        g = main.model(torch.tensor([tokens])).last_hidden_state
        fed = [*tokens[1:], int(main.lm_head(g[0, -1]).argmax())]
        for _ in range(steps):
            e = main.model.embed_tokens(torch.tensor([fed]))
            halves = [norm(x, w.shape, w, config.rms_norm_eps) for x, w in ((e, enorm), (g, hnorm))]
            rows = torch.cat(halves, -1) @ eh_proj.T
            out = module.model(inputs_embeds=rows, use_cache=False).last_hidden_state[:, -1:]
            logits.append(main.lm_head(out)[0, 0].numpy())
            ids.append(int(logits[-1].argmax()))
            fed, g = [*fed, ids[-1]], torch.cat([g, out], 1)
    return ids, np.array(logits)
