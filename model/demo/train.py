"""Train the demo checkpoint: python -m porthal.model.demo.train --out DIRECTORY [--minutes 40] [--threads 2]

The forward pass that learns is the project's own model in bfloat16, bound to PyTorch with the attention ops replaced by
dense, masked and differentiable forms of the same formulas. As for GLM-5 in small: dense attention; then the lightning
indexer learns the attention's own distribution; then attention only over what the indexer selects, on longer texts. The
MTP layer is trained on several of its own steps. Draws are seeded; how many steps fit into the minutes is the machine's.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from torch import Tensor

from porthal.hal import Batch, Binding, Pages, Selection, Weight, bind, narrow
from porthal.hal.discovery import backend_class
from porthal.model.config import Config
from porthal.model.demo import corpus
from porthal.model.generate import generate
from porthal.model.glm5 import Glm5
from porthal.model.load import load

Array = np.ndarray[Any, Any]

CONFIG: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "bfloat16",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 96,
    "v_head_dim": 32,
    "head_dim": 64,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_topk": 128,
    "indexer_rope_interleave": True,
    "n_routed_experts": 4,
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
    "latent_norm_eps": 1e-6,
    "rope_interleave": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "eos_token_id": [corpus.EOS],
    "pad_token_id": corpus.EOS,
}
SEED = 0
BATCH = 4096  # tokens of a step
DRAFTS = 3
BIAS = ".e_score_correction_bias"


class Stage(NamedTuple):
    """What the run does from a share `start` of its time on."""

    start: float
    length: int
    unroll: int  # steps of the MTP layer
    indexer: bool
    sparse: bool


STAGES = (
    Stage(0.0, 256, 1, False, False),
    Stage(0.45, 256, DRAFTS, False, False),
    Stage(0.55, 256, DRAFTS, True, False),
    Stage(0.68, 512, DRAFTS, True, True),
    Stage(0.93, 1024, DRAFTS, True, True),
)
DECAY = 0.5  # the last share of the time, in which step sizes fall to 0
ADAM, MUON, BALANCE = 3e-3, 0.02, 0.02


class Training(backend_class("torch")):  # type: ignore[misc]
    """PyTorch for texts of one length, R requests of T tokens each from position 0, without pages.

    What an attention op hands to the next is opaque to the model: queries and keys stay per head (W_UK and W_UV are applied
    to the keys, far cheaper than absorbed at the demo's widths), and a Selection is (scores, mask). With `indexer`, `losses`
    collects KL(p || softmax(scores)) for every layer that selects, p the attention averaged over the heads; with `sparse`,
    attention is over the indexer's k highest scores, all of those that tie for the last place included.
    """

    name = "training"

    def __init__(self) -> None:
        super().__init__()
        self.indexer, self.sparse = False, False
        self.losses: list[Tensor] = []
        self.parameters: list[Tensor] = []

    def from_numpy(self, x: Array) -> Tensor:
        tensor: Tensor = super().from_numpy(x)
        if tensor.is_floating_point():  # ids apart, all that comes from the host is parameters
            self.parameters.append(tensor.requires_grad_())
        return tensor

    # -- cheaper to differentiate ------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        r = x + residual
        return self.rms_norm(r, weight, eps=eps), r

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)

    def silu_mul(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    # -- attention ---------------------------------------------------------------------------------------------------

    def mla_prolog(
        self,
        h: Tensor,
        q_a: Weight,
        q_norm: Tensor,
        q_b: Weight,
        kv_a: Weight,
        kv_norm: Tensor,
        w_uk: Weight,
        kv: Any,
        batch: Batch,
        *,
        theta: float,
        eps: float,
    ) -> tuple[Tensor, None, Tensor, tuple[Tensor, Tensor]]:
        heads, latent, nope = w_uk.native.shape
        texts = (batch.R, batch.T // batch.R)
        qr = self.rms_norm(F.linear(h, q_a.native), q_norm, eps=eps)
        q = F.linear(qr, q_b.native).unflatten(-1, (heads, -1))
        width = q.shape[-1] - nope
        turn = {"theta": theta, "layout": "interleaved", "width": width}
        a = F.linear(h, kv_a.native)
        c = self.rms_norm(a[:, :latent], kv_norm, eps=eps)
        k = F.linear(c, w_uk.native.transpose(1, 2).flatten(0, 1)).unflatten(-1, (heads, nope))
        kp = self.rope(a[:, None, latent:], batch, start=0, **turn).expand(-1, heads, -1)
        q = self.rope(q, batch, start=nope, **turn)
        per_head = (x.unflatten(0, texts).transpose(1, 2) for x in (q, torch.cat([k, kp], -1)))
        q, k = per_head
        return q, None, qr, (k, c)

    def index_prolog(
        self,
        qr: Tensor,
        h: Tensor,
        wq_b: Weight,
        wk: Weight,
        k_norm: Tensor,
        k_bias: Tensor,
        w_head: Weight,
        keys: Any,
        batch: Batch,
        *,
        theta: float,
        width: int,
        eps: float = 1e-6,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not self.indexer:
            return None, None, None
        qr, h = qr.detach(), h.detach()
        texts = (batch.R, batch.T // batch.R)
        turn = {"theta": theta, "layout": "interleaved", "start": 0, "width": width}
        iq = self.rope(F.linear(qr, wq_b.native).unflatten(-1, (-1, wk.native.shape[0])), batch, **turn)
        k = self.rope(self.layer_norm(F.linear(h, wk.native), k_norm, k_bias, eps=eps)[:, None], batch, **turn)
        w = F.linear(h, w_head.native)
        return iq.unflatten(0, texts), w.unflatten(0, texts), k[:, 0].unflatten(0, texts)

    def indexer_topk(
        self, iq: Tensor | None, w: Tensor | None, keys: Tensor | None, batch: Batch, *, k: int, scale: float
    ) -> tuple[Tensor | None, Tensor]:
        T = batch.T // batch.R
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        if iq is None or w is None or keys is None:
            return None, hidden
        products = (iq.flatten(1, 2) @ keys.transpose(1, 2)).relu().unflatten(1, (T, -1))
        scores = scale * (products * w[..., None]).sum(2, dtype=torch.float32)
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.sparse and T > k:
            edge = scores.detach().topk(k, sorted=False).values.amin(-1, keepdim=True)
            hidden = hidden | (scores.detach() < edge)
        return scores, hidden

    def sparse_mla(
        self, q: Tensor, _: None, kv: tuple[Tensor, Tensor], selection: Any, batch: Batch, *, scale: float
    ) -> tuple[Tensor, Tensor]:
        k, c = kv
        scores, hidden = selection
        logits = (scale * q) @ k.transpose(2, 3)
        p = logits.masked_fill_(hidden if hidden.ndim == 2 else hidden[:, None], -torch.inf).softmax(-1)
        if scores is not None:
            q_log = scores.masked_fill(hidden, -1e30).log_softmax(-1)
            self.losses.append(F.kl_div(q_log, p.detach().mean(1, dtype=torch.float32), reduction="sum") / batch.T)
        return p, c

    def mla_output(self, o: tuple[Tensor, Tensor], w_uv: Weight, w_o: Weight) -> Tensor:
        p, c = o
        R, heads, T, _ = p.shape
        v = F.linear(c, w_uv.native.flatten(0, 1)).view(R, T, heads, -1).transpose(1, 2)
        return F.linear((p @ v).transpose(1, 2).reshape(R * T, -1), w_o.native)

    # -- experts -----------------------------------------------------------------------------------------------------

    def moe_route(self, logits: Tensor, bias: Tensor, **attrs: Any) -> tuple[Tensor, Tensor]:
        """As inherited; the bias, which gets no gradient from any loss, gets the excess load of its experts as one."""
        ids, weights = super().moe_route(logits, bias.detach(), **attrs)
        load = torch.bincount(ids.flatten(), minlength=len(bias)).float()
        bias.grad = load - load.mean() + (0.0 if bias.grad is None else bias.grad)
        return ids, weights


# -- parameters ------------------------------------------------------------------------------------------------------


class Tensors(dict[str, Array]):
    """A source of tensors in memory; one that is missing is drawn from a seed of its own, whatever the order."""

    def has(self, name: str) -> bool:
        return not name.endswith("_scale_inv")

    def read(self, name: str, shape: Sequence[int], rows: slice) -> Array:
        if name not in self:
            self[name] = self._draw(name, tuple(shape)).astype(np.float32)
        return self[name][rows]

    def _draw(self, name: str, shape: tuple[int, ...]) -> Array:
        if len(shape) == 1:
            return np.full(shape, 0.0 if name.endswith("bias") else 1.0)
        scale = {"model.embed_tokens.weight": 0.5, "lm_head.weight": 0.02}.get(name, shape[-1] ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= (2 * CONFIG["num_hidden_layers"]) ** -0.5  # so that the residual sum starts near 1
        return scale * np.random.default_rng([SEED, zlib.crc32(name.encode())]).standard_normal(shape)


class Optimiser:
    """float32 masters under the published names, behind the tensors that a binding made of them.

    Which element went where is found by loading the model once more from a source that holds every element's number.
    Muon steps for matrices; Adam for vectors, embedding, head and the narrow matrices of routers and indexers; signs of the
    load for router biases. Masters lie in one vector, equal kinds and shapes side by side.
    """

    NARROW = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "weights_proj.weight")

    def __init__(self, config: Config, initial: Tensors, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        kinds = {n: (self._kind(n, t), t.shape, n) for n, t in initial.items()}
        self.names = sorted(initial, key=kinds.__getitem__)
        self.masters = torch.from_numpy(np.concatenate([initial[n].ravel() for n in self.names]))
        self.shapes = [initial[n].shape for n in self.names]
        sizes = [math.prod(s) for s in self.shapes]
        if sum(sizes) >= 2**24:
            raise ValueError(f"{sum(sizes)} parameters cannot be numbered exactly in float32")
        numbers = np.split(np.arange(sum(sizes), dtype=np.float32), np.cumsum(sizes)[:-1])
        counting = Training()
        Glm5(config, Tensors({n: x.reshape(s) for n, x, s in zip(self.names, numbers, self.shapes)}),
             bind(backend=counting), "float32")  # fmt: skip
        self.order = torch.cat([p.detach().flatten() for p in counting.parameters]).int()
        assert len(self.order) == len(self.order.unique()) == len(self.masters)

        self.grads = torch.zeros_like(self.masters)
        self.momentum = torch.zeros_like(self.masters)
        self.matrices = []
        start = 0
        self.adam_until, self.muon_until = (
            sum(z for n, z in zip(self.names, sizes) if kinds[n][0] <= kind) for kind in (0, 1)
        )
        for shape in dict.fromkeys(s for n, s in zip(self.names, self.shapes) if kinds[n][0] == 1):
            count = sum(kinds[n][:2] == (1, shape) for n in self.names)
            first = self.adam_until + start
            start += count * math.prod(shape)
            self.matrices.append(slice(first, first + count * math.prod(shape)))
        ...
