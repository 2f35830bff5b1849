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
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from torch import Tensor

from porthal.hal import Batch, Binding, Weight, bind, narrow
from porthal.hal.discovery import backend_class
from porthal.model.config import Config
from porthal.model.demo import corpus
from porthal.model.evaluate import bits_per_token
from porthal.model.generate import generate
from porthal.model.glm5 import Glm5
from porthal.model.load import load

Array = np.ndarray[Any, Any]

CONFIG: dict[str, Any] = json.loads((Path(__file__).parent / "config.json").read_text(encoding="utf-8"))
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
    Stage(0.5, 256, DRAFTS, False, False),
    Stage(0.56, 256, DRAFTS, True, False),
    Stage(0.69, 512, DRAFTS, True, True),
    Stage(0.88, 1024, DRAFTS, True, True),
)
DECAY = 0.6  # the last share of the time, in which step sizes fall to 0
ADAM, MUON, BALANCE = 3e-3, 0.02, 0.02


class Training(backend_class("torch")):  # type: ignore[misc]
    """PyTorch for texts of one length, R requests of T tokens each from position 0, without pages.

    What an attention op hands to the next is opaque to the model: queries and keys stay per head (W_UK and W_UV are applied
    to the keys, far cheaper than absorbed at the demo's widths), and a Selection is (scores, mask). With `indexer`, `losses`
    collects KL(p || softmax(scores)) for every layer that selects, p the attention averaged over the heads; with `sparse`,
    attention and that loss are over the indexer's k highest scores, ties going to the lowest position.
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

    def rope(self, x: Tensor, batch: Batch, *, theta: float, layout: str, start: int, width: int) -> Tensor:
        """Interleaved only: a product of complex numbers."""
        angle = batch.native.positions[:, None, None] * theta ** (-torch.arange(0, width, 2) / width)
        pairs = x[..., start : start + width].float().unflatten(-1, (-1, 2))
        turned = torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angle), angle)
        y = torch.view_as_real(turned).flatten(-2).to(x.dtype)
        return torch.cat([x[..., :start], y, x[..., start + width :]], -1)

    def silu_mul(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    # -- attention ---------------------------------------------------------------------------------------------------

    def mla_prolog(self, h: Tensor, *operands: Any, theta: float, eps: float) -> tuple[Any, ...]:
        q_a, q_norm, q_b, kv_a, kv_norm, w_uk, _, batch = operands
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
        q, k = (x.unflatten(0, texts).transpose(1, 2) for x in (q, torch.cat([k, kp], -1)))
        return q, None, qr, (k, c)

    def index_prolog(self, qr: Tensor, h: Tensor, *operands: Any, theta: float, width: int, eps: float = 1e-6) -> Any:
        wq_b, wk, k_norm, k_bias, w_head, _, batch = operands
        if not self.indexer:
            return None, None, None
        qr, h = qr.detach(), h.detach()
        texts = (batch.R, batch.T // batch.R)
        turn: dict[str, Any] = {"theta": theta, "layout": "interleaved", "start": 0, "width": width}
        iq = self.rope(F.linear(qr, wq_b.native).unflatten(-1, (-1, wk.native.shape[0])), batch, **turn)
        k = self.rope(self.layer_norm(F.linear(h, wk.native), k_norm, k_bias, eps=eps)[:, None], batch, **turn)
        w = F.linear(h, w_head.native)
        return iq.unflatten(0, texts), w.unflatten(0, texts), k[:, 0].unflatten(0, texts)

    def indexer_topk(self, iq: Any, w: Any, keys: Any, batch: Batch, *, k: int, scale: float) -> Any:
        T = batch.T // batch.R
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        if iq is None:
            return None, hidden
        products = (iq.flatten(1, 2) @ keys.transpose(1, 2)).relu().unflatten(1, (T, -1))
        scores = scale * (products * w[..., None]).sum(2, dtype=torch.float32)
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.sparse and k < T:
            values = scores.detach()
            edge = torch.from_numpy(np.partition(values.numpy(), T - k)[..., T - k, None])  # far faster than torch.topk
            above, level = values > edge, values == edge
            chosen = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
            hidden = hidden | ~chosen
        return scores, hidden

    def sparse_mla(self, q: Tensor, _: None, kv: Any, selection: Any, batch: Batch, *, scale: float) -> Any:
        k, c = kv
        scores, hidden = selection
        logits = (scale * q) @ k.transpose(2, 3)
        p = logits.masked_fill_(hidden if hidden.ndim == 2 else hidden[:, None], -torch.inf).softmax(-1)
        if scores is not None:
            q_log = scores.masked_fill(hidden, -1e30).log_softmax(-1)
            self.losses.append(F.kl_div(q_log, p.detach().mean(1, dtype=torch.float32), reduction="sum") / batch.T)
        return p, c

    def mla_output(self, o: Any, w_uv: Weight, w_o: Weight) -> Tensor:
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

    def holds(self, prefix: str) -> bool:
        return not prefix.endswith("experts.gate_up_proj")  # drawn one by one, as published

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

    Muon for matrices; Adam for vectors, embedding, head and the narrow matrices of routers and indexers; for router biases
    a step against the sign of the excess load. Masters lie in one vector, equal kinds and shapes side by side.
    """

    NARROW = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "weights_proj.weight")

    def __init__(self, config: Config, initial: Tensors, parameters: list[Tensor]) -> None:
        def group(name: str) -> tuple[str, tuple[int, ...]]:
            shape = initial[name].shape
            plain = len(shape) == 1 or name.endswith(self.NARROW)
            return "balance" if name.endswith(BIAS) else "adam" if plain else "muon", shape

        self.parameters = parameters
        self.names = sorted(initial, key=group)
        self.shapes = [initial[n].shape for n in self.names]
        self.masters = torch.from_numpy(np.concatenate([initial[n].ravel() for n in self.names]))
        self.grads, self.momentum = torch.zeros_like(self.masters), torch.zeros_like(self.masters)
        self.order = self._where(config)

        self.groups, end = [], 0
        for (kind, shape), names in groupby(self.names, group):
            start, end = end, end + math.prod(shape) * len(list(names))
            parts = (x[start:end].view(-1, *shape) for x in (self.masters, self.grads, self.momentum))
            self.groups.append((kind, tuple(parts)))
        vectors = [(w, g) for kind, (w, g, _) in self.groups if kind == "adam"]
        for w, g in vectors:
            w.grad = g
        self.adam = torch.optim.Adam([w for w, _ in vectors], betas=(0.9, 0.95))

    def _where(self, config: Config) -> Tensor:
        """For each element of the parameters, its place among the masters: read from a model whose weights are places."""
        places = torch.arange(len(self.masters), dtype=torch.float64)
        counting = Training()
        Glm5(config, Tensors(self.named(places)), bind(backend=counting))
        found = torch.cat([p.detach().flatten() for p in counting.parameters]).long()
        if not torch.equal(found.sort().values, places.long()):
            raise ValueError(f"{len(places)} parameters cannot be told apart by numbers in float32")
        return found

    def named(self, values: Tensor) -> dict[str, Array]:
        parts = values.split([math.prod(s) for s in self.shapes])
        return {n: part.view(s).numpy() for n, s, part in zip(self.names, self.shapes, parts)}

    @torch.no_grad()
    def step(self, share: float) -> None:
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in self.parameters]
        self.grads.index_copy_(0, self.order, torch.cat(flat))
        self.adam.param_groups[0]["lr"] = ADAM * share
        self.adam.step()
        for kind, (w, g, m) in self.groups:
            if kind == "muon":
                m.lerp_(g, 0.05)
                tall = max(1.0, w.shape[-2] / w.shape[-1]) ** 0.5
                w.add_(orthogonal(g.lerp(m, 0.95)), alpha=-MUON * share * tall)
            elif kind == "balance":
                w.sub_(g.sign(), alpha=BALANCE * share)
        fresh = self.masters.index_select(0, self.order).split([p.numel() for p in self.parameters])
        for p, values in zip(self.parameters, fresh):
            p.copy_(values.view_as(p))
            p.grad = None

    def write(self, directory: Path) -> None:
        """The checkpoint, rounded to bfloat16 as the forward pass has it; router biases stay float32, as published."""
        directory.mkdir(parents=True, exist_ok=True)
        named = self.named(self.masters).items()
        tensors = {n: x.copy() if n.endswith(BIAS) else narrow(x, "bfloat16") for n, x in named}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        write_json(directory / "config.json", CONFIG)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def orthogonal(g: Tensor) -> Tensor:
    """Five Newton-Schulz steps from matrices [n, rows, columns] towards the nearest semi-orthogonal ones (Muon)."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * (a @ a) - 4.7750 * a) @ x
    return (x.mT if tall else x).float()


# -- the run ---------------------------------------------------------------------------------------------------------


def whole_texts(ops: Binding, count: int, length: int) -> Batch:
    """`count` requests that each append positions 0 to length - 1; no page is ever touched."""
    return ops.plan(Batch.build([length] * count, [length] * count, [range(-(-length // 64))] * count, 64))


def train(text: Array, directory: Path, minutes: float) -> dict[str, int]:
    """Train on a uint8 stream; the checkpoint is written whenever a stage ends."""
    config, backend, initial = Config.parse(CONFIG), Training(), Tensors()
    ops = bind(backend=backend)
    model = Glm5(config, initial, ops, "bfloat16")
    assert model.mtp
    optimiser = Optimiser(config, initial, backend.parameters)
    print(f"{len(optimiser.masters)} parameters; {ops.summary()}", flush=True)
    rng, cache = np.random.default_rng(SEED), model.new_cache([1])
    begin, step, tokens, shown = time.monotonic(), 0, 0, []
    for stage, end in zip(STAGES, [*(s.start for s in STAGES[1:]), 1.0]):
        backend.indexer, backend.sparse = stage.indexer, stage.sparse
        batch = whole_texts(ops, BATCH // stage.length, stage.length)
        half = whole_texts(ops, batch.R // 2, stage.length)  # enough for the MTP layer
        while (done := (time.monotonic() - begin) / (60 * minutes)) < end:
            starts = rng.integers(0, len(text) - stage.length - DRAFTS - 1, batch.R)
            window = np.stack([text[s : s + stage.length + DRAFTS + 1] for s in starts]).astype(np.int32)
            ids = [torch.from_numpy(window[:, i : i + stage.length].flatten()) for i in range(DRAFTS + 2)]
            backend.losses = []
            g = model.hidden(ids[0], batch, cache)
            losses = [F.cross_entropy(model.logits(g), ids[1].long())]
            g = g[: half.T]
            for i in range(1, stage.unroll + 1):
                g, _ = model.mtp.hidden(ids[i][: half.T], model.embed, g, half, cache.layers[-1], None)
                losses.append(F.cross_entropy(model.logits(g), ids[i + 1][: half.T].long()))
            (losses[0] + 0.3 / stage.unroll * sum(losses[1:]) + sum(backend.losses)).backward()
            optimiser.step(min(1.0, (step + 1) / 30, max(0.02, (1 - done) / DECAY)))
            step, tokens = step + 1, tokens + batch.T
            shown.append([x.item() / math.log(2) for x in losses])
            if step % 50 == 0:
                bits = " ".join(f"{b:.3f}" for b in np.mean([s for s in shown[-50:] if len(s) == len(losses)], axis=0))
                kl = " ".join(f"{x.item():.3f}" for x in backend.losses)
                print(f"{done:4.0%} step {step}, {tokens / 1e6:.2f} M tokens: bits {bits} kl {kl}", flush=True)
        optimiser.write(directory)
    return {"parameters": len(optimiser.masters), "steps": step, "tokens": tokens}


# -- what it is worth ------------------------------------------------------------------------------------------------


def tokens_per_forward(model: Glm5, text: Array, prompts: int = 48, length: int = 256, new: int = 64) -> list[float]:
    """Greedy with DRAFTS drafts after prompts spread over a text: tokens per verifying forward, in the first such forward
    of each prompt and in all. The first has seen nothing that the model wrote itself: no loop that is easy to foresee."""
    first: list[int] = []
    every: list[int] = []
    for start in np.linspace(0, len(text) - length, prompts).astype(int):
        emitted: list[int] = []

        def count(_: int, ids: list[int], to: list[int] = emitted) -> None:
            to.append(len(ids))

        prompt = text[start : start + length].tolist()
        generate(model, [prompt], new, speculative=DRAFTS, on_tokens=count)
        first += emitted[1:2]  # before them came the token of the prefill
        every += emitted[1:]
    return [float(np.mean(first)), float(np.mean(every))]


def evaluate(directory: Path, text: Array) -> dict[str, Any]:
    """The written checkpoint on the inference path: backend torch, float32, paged caches."""
    model, byte_model = load(directory, bind("torch"), dtype="float32"), corpus.ByteModel(text)
    files = {name: corpus.stream([(name, data)]) for name, data in corpus.held_out()}
    sizes = np.array([len(x) - 1 for x in files.values()])

    def over_all(measure: Any) -> dict[str, float]:
        each = {name: measure(x) for name, x in files.items()}
        return {**each, "all": float(np.average(list(each.values()), weights=sizes))}

    first, every = tokens_per_forward(model, np.concatenate(list(files.values())))
    return {
        "bits_per_byte": over_all(lambda x: bits_per_token(model, x.tolist(), model.config.max_position_embeddings)),
        "bits_per_byte_order_3": over_all(lambda x: float(byte_model.bits(x)[1:].mean())),
        "tokens_per_forward": every,
        "tokens_per_first_forward": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint on this Python's standard library.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--minutes", type=float, default=40, help="time to train; the evaluation comes on top")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = corpus.stream(corpus.training())
    recipe = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "training_text_sha256": corpus.sha256(text.tobytes()),
        "training_text_bytes": len(text),
        "held_out_sha256": corpus.HELD_OUT,
        "seed": SEED,
        "minutes": args.minutes,
        "threads": args.threads,
        **train(text, args.out, args.minutes),
    }
    recipe |= evaluate(args.out, text)
    write_json(args.out / "recipe.json", recipe)
    print(json.dumps(recipe, indent=2))


if __name__ == "__main__":
    main()
