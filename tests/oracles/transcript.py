"""GLM-5's forward pass and its multi-token prediction (MTP) module in plain float64 NumPy: no cache, K and V expanded.

Shapes: T tokens, D hidden, R rope values per head, k = index_topk. `lin(W, x) = x W^T`, weights stored [out, in].
Equal scores are taken in order of index. One sequence at a time; row i is position i.
Every name in `WRONG` switches on one mistake that loads and runs without complaint; tests show that each is visible.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WRONG = {
    "mla_half_rope": "attention rotates (x_i, x_{i+R/2}) instead of (x_2i, x_2i+1)",
    "indexer_half_rope": "the indexer rotates (x_i, x_{i+R/2}) instead of (x_2i, x_2i+1)",
    "mla_rope_first": "an attention query is read as [rope | nope] instead of [nope | rope]",
    "indexer_rope_last": "an indexer head is read as [rest | rope] instead of [rope | rest]",
    "head_dim_frequencies": "frequencies use `head_dim` instead of `qk_rope_head_dim`",
    "default_theta": "rope theta 10000 instead of `rope_parameters.rope_theta`",
    "latent_eps": "the latent norms use `rms_norm_eps` instead of `latent_norm_eps`",
    "k_norm_rms": "the index key norm is an RMSNorm instead of a LayerNorm with bias",
    "yarn_mscale": "the softmax scale is multiplied by YaRN's mscale squared (factor 40)",
    "bias_in_weights": "expert weights come from the biased scores",
    "router_bf16": "the router's inputs, weights and logits are rounded to bfloat16",
    "ties_highest": "equal scores are taken from the highest index down",
    "indexer_on_shared": "layers that share a selection run an indexer with weights nobody loaded",
    "mtp_hidden_first": "eh_proj reads [hidden | embedding] instead of [embedding | hidden]",
}

INDEXER = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
ATTENTION = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
MTP = ("enorm", "hnorm", "eh_proj", "shared_head.norm")


def read(directory: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and every tensor of every *.safetensors, as float64 (bfloat16 is the upper half of a float32)."""
    weights = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            raw = np.frombuffer(data[start + begin : start + end], {"BF16": "<u2", "F32": "<f4"}[entry["dtype"]])
            values = (raw.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else raw
            weights[name] = values.reshape(entry["shape"]).astype(np.float64)
    return json.loads((Path(directory) / "config.json").read_text()), weights


def lin(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x @ weight.T


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return weight * centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) + bias


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def bf16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)


class Transcript:
    """One checkpoint, read once, and the choices it made.

    `selected` {layer: bool [T, T]} and `experts` {layer: int [T, experts per token]} are those of the last pass; `gaps`
    holds, for every top-k so far that left something out, the last score chosen minus the first left out.
    """

    def __init__(self, directory: str | Path, variant: Iterable[str] = ()) -> None:
        self.config, self.weights = read(directory)
        self.variant = set(variant)
        if self.variant - WRONG.keys():
            raise ValueError(f"variant {sorted(self.variant - WRONG.keys())} is unknown; use names of WRONG")
        c = self.config
        self.eps = c["rms_norm_eps"]
        self.latent_eps = c["rms_norm_eps" if "latent_eps" in self.variant else "latent_norm_eps"]
        self.selected: dict[int, np.ndarray] = {}
        self.experts: dict[int, np.ndarray] = {}
        self.gaps: list[float] = []

    def top(self, scores: np.ndarray, k: int) -> np.ndarray:
        """Indices of the k largest scores; equal scores by ascending index."""
        if "ties_highest" in self.variant:
            order = len(scores) - 1 - np.argsort(-scores[::-1], kind="stable")
        else:
            order = np.argsort(-scores, kind="stable")
        if k < len(scores):
            self.gaps.append(float(scores[order[k - 1]] - scores[order[k]]))
        return order[:k]

    def rope(self, x: np.ndarray, half: bool) -> np.ndarray:
        """x [T, heads, R]: pair i turns by position * theta^(-2i/R); pairs stay where they were."""
        rows, _, width = x.shape
        theta = 10000.0 if "default_theta" in self.variant else self.config["rope_parameters"]["rope_theta"]
        dim = self.config["head_dim"] if "head_dim_frequencies" in self.variant else width
        angle = np.arange(rows)[:, None, None] * theta ** (-2 * np.arange(width // 2) / dim)
        pairs = (slice(None, width // 2), slice(width // 2, None)) if half else (slice(0, None, 2), slice(1, None, 2))
        first, second = (np.s_[..., values] for values in pairs)
        out = np.empty_like(x)
        out[first] = x[first] * np.cos(angle) - x[second] * np.sin(angle)
        out[second] = x[second] * np.cos(angle) + x[first] * np.sin(angle)
        return out

    def select(self, layer: int, h: np.ndarray, qr: np.ndarray) -> np.ndarray:
        """The indexer: bool [T, T], row t true at the min(k, t+1) best s <= t.

        score[t, s] = sum_n w[t, n] max(0, iq[t, n] . ik[s]), w = weights_proj h / sqrt(heads * width).
        """
        c, rows, half = self.config, len(h), "indexer_half_rope" in self.variant
        heads, width, r = c["index_n_heads"], c["index_head_dim"], c["qk_rope_head_dim"]
        w = {n: self.weights.get(f"model.layers.{layer}.self_attn.indexer.{n}") for n in INDEXER}
        if w["wk.weight"] is None:
            shapes = (heads * width, qr.shape[1]), (width, h.shape[1]), (width,), (width,), (heads, h.shape[1])
            w = {n: np.random.default_rng(layer).normal(size=s) for n, s in zip(INDEXER, shapes, strict=True)}
        iq = lin(w["wq_b.weight"], qr).reshape(rows, heads, width)
        ik = lin(w["wk.weight"], h)
        if "k_norm_rms" in self.variant:
            ik = rms_norm(ik, w["k_norm.weight"], 1e-6)
        else:
            ik = layer_norm(ik, w["k_norm.weight"], w["k_norm.bias"], 1e-6)
        ik = ik[:, None]
        turned = np.s_[..., width - r :] if "indexer_rope_last" in self.variant else np.s_[..., :r]
        iq[turned], ik[turned] = self.rope(iq[turned], half), self.rope(ik[turned], half)
        relu = np.maximum(0, np.einsum("tnd,sd->tns", iq, ik[:, 0]))
        score = np.einsum("tn,tns->ts", lin(w["weights_proj.weight"], h) * (heads * width) ** -0.5, relu)
        mask = np.zeros((rows, rows), bool)
        for t in range(rows):
            mask[t, self.top(score[t, : t + 1], min(c["index_topk"], t + 1))] = True
        return mask

    def attention(self, layer: int, h: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Multi-head latent attention over mask [T, T], by the layer's own indexer when None; returns the mask too."""
        c, rows, half = self.config, len(h), "mla_half_rope" in self.variant
        heads, latent = c["num_attention_heads"], c["kv_lora_rank"]
        nope, r = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        w = {n: self.weights[f"model.layers.{layer}.self_attn.{n}.weight"] for n in ATTENTION}
        qr = rms_norm(lin(w["q_a_proj"], h), w["q_a_layernorm"], self.latent_eps)
        q = lin(w["q_b_proj"], qr).reshape(rows, heads, nope + r)
        qp, qn = (q[..., :r], q[..., r:]) if "mla_rope_first" in self.variant else (q[..., nope:], q[..., :nope])
        a = lin(w["kv_a_proj_with_mqa"], h)
        kv = lin(w["kv_b_proj"], rms_norm(a[:, :latent], w["kv_a_layernorm"], self.latent_eps)).reshape(rows, heads, -1)
        kn, v = kv[..., :nope], kv[..., nope:]
        qp, kp = self.rope(qp, half), self.rope(a[:, None, latent:], half)[:, 0]
        if mask is None:
            mask = self.select(layer, h, qr)
        scale = (nope + r) ** -0.5
        if "yarn_mscale" in self.variant:
            scale *= (0.1 * np.log(40) + 1) ** 2
        logits = scale * (np.einsum("tnd,snd->nts", qn, kn) + np.einsum("tnd,sd->nts", qp, kp))
        p = np.where(mask, np.exp(logits - np.where(mask, logits, -np.inf).max(-1, keepdims=True)), 0)
        o = np.einsum("nts,snd->tnd", p / p.sum(-1, keepdims=True), v)
        return lin(w["o_proj"], o.reshape(rows, -1)), mask

    def mlp(self, prefix: str, x: np.ndarray) -> np.ndarray:
        gate, up = lin(self.weights[f"{prefix}.gate_proj.weight"], x), lin(self.weights[f"{prefix}.up_proj.weight"], x)
        return lin(self.weights[f"{prefix}.down_proj.weight"], gate * sigmoid(gate) * up)

    def moe(self, layer: int, x: np.ndarray) -> np.ndarray:
        """y = sum of chosen experts + shared expert; s = sigmoid(gate x); the bias selects, the plain s weighs."""
        c, prefix = self.config, f"model.layers.{layer}.mlp"
        gate, bias = self.weights[f"{prefix}.gate.weight"], self.weights[f"{prefix}.gate.e_score_correction_bias"]
        s = sigmoid(bf16(lin(bf16(gate), bf16(x))) if "router_bf16" in self.variant else lin(gate, x))
        chosen = np.array([self.top(row, c["num_experts_per_tok"]) for row in s + bias])
        w = np.take_along_axis(s + bias if "bias_in_weights" in self.variant else s, chosen, 1)
        w = c["routed_scaling_factor"] * w / (w.sum(1, keepdims=True) + 1e-20)
        self.experts[layer] = chosen
        y = self.mlp(f"{prefix}.shared_experts", x)
        for t, slot in np.ndindex(*chosen.shape):
            y[t] += w[t, slot] * self.mlp(f"{prefix}.experts.{chosen[t, slot]}", x[t])
        return y

    def block(self, layer: int, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        norm = {n: self.weights[f"model.layers.{layer}.{n}_layernorm.weight"] for n in ("input", "post_attention")}
        y, self.selected[layer] = self.attention(layer, rms_norm(x, norm["input"], self.eps), mask)
        x = x + y
        h = rms_norm(x, norm["post_attention"], self.eps)
        dense = layer < self.config["first_k_dense_replace"]
        return x + (self.mlp(f"model.layers.{layer}.mlp", h) if dense else self.moe(layer, h))

    def hidden(self, tokens: Sequence[int]) -> np.ndarray:
        """[T, D], after the final norm: what lm_head and the MTP module read."""
        layers = self.config["num_hidden_layers"]
        types = self.config.get("indexer_types") or ["full"] * layers
        x = self.weights["model.embed_tokens.weight"][np.asarray(tokens)]
        for layer in range(layers):
            own = types[layer] == "full" or "indexer_on_shared" in self.variant
            x = self.block(layer, x, None if own else self.selected[layer - 1])
        return rms_norm(x, self.weights["model.norm.weight"], self.eps)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        return lin(self.weights["lm_head.weight"], hidden)

    def mtp(self, tokens: Sequence[int], g: np.ndarray, mask: np.ndarray | None, zero_first: bool) -> np.ndarray:
        """[T, D], after its norm: row i reads tokens[i], the token at position i+1, and g[i], the hidden of i."""
        layer = self.config["num_hidden_layers"]
        w = {n: self.weights[f"model.layers.{layer}.{n}.weight"] for n in MTP}
        embedded = self.weights["model.embed_tokens.weight"][np.asarray(tokens)]
        if zero_first:
            embedded[0] = 0
        halves = [rms_norm(embedded, w["enorm"], self.eps), rms_norm(g, w["hnorm"], self.eps)]
        if "mtp_hidden_first" in self.variant:
            halves.reverse()
        x = self.block(layer, lin(w["eh_proj"], np.concatenate(halves, 1)), mask)
        return rms_norm(x, w["shared_head.norm"], self.eps)

    def drafts(
        self, tokens: Sequence[int], hidden: np.ndarray | None, steps: int, index_share: bool | None, zero_first: bool
    ) -> tuple[list[int], np.ndarray]:
        """See `mtp_drafts`."""
        g = self.hidden(tokens) if hidden is None else np.asarray(hidden, np.float64)
        share = self.config.get("index_share_for_mtp_iteration", False) if index_share is None else index_share
        fed = [*tokens[1:], int(self.head(g[-1]).argmax())]
        ids: list[int] = []
        logits: list[np.ndarray] = []
        mask = None
        for _ in range(steps):
            out = self.mtp(fed, g, mask, zero_first)
            logits.append(self.head(out[-1]))
            ids.append(int(logits[-1].argmax()))
            fed, g = [*fed, ids[-1]], np.concatenate([g, out[-1:]])
            if share:  # the row added next repeats the last one, so no drafted position is ever selected
                mask = np.pad(self.selected[self.config["num_hidden_layers"]], ((0, 1), (0, 1)))
                mask[-1] = mask[-2]
        return ids, np.array(logits)


def forward(directory: str | Path, tokens: Sequence[int], variant: Iterable[str] = ()) -> np.ndarray:
    """Logits [T, vocab], float64."""
    model = Transcript(directory, variant)
    return model.head(model.hidden(tokens))


def mtp_drafts(
    directory: str | Path,
    tokens: Sequence[int],
    hidden: np.ndarray | None = None,
    steps: int = 3,
    index_share: bool | None = None,
    zero_first: bool = False,
    variant: Iterable[str] = (),
) -> tuple[list[int], np.ndarray]:
    """Greedy drafts after `tokens` and the next token the main model chooses: ids [steps], logits [steps, vocab].

    Draft j is the token for position T+1+j. Step 0 runs the module over rows 0..T-1 with the main model's hidden
    (`hidden` [T, D], computed when None); step j adds row T-1+j, which reads the draft and the output of step j-1.
    With index_share (None: the config's `index_share_for_mtp_iteration`) added rows attend to what row T-1 selected.
    zero_first zeroes the embedding in row 0, as some engines do.
    """
    return Transcript(directory, variant).drafts(tokens, hidden, steps, index_share, zero_first)
