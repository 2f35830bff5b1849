"""Multi-head latent attention over the positions that the lightning indexer selects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from porthal.hal import Batch, Binding, Pages, PagesSpec, Selection
from porthal.model.checkpoint import Loader, within
from porthal.model.config import Config
from porthal.model.layout import Layout


@dataclass
class LayerCache:
    """One layer's pages: latents, and index keys where the layer selects for itself."""

    kv: Pages
    keys: Pages | None

    @classmethod
    def alloc(cls, ops: Binding, config: Config, full: bool, dtype: str, n_blocks: int, block_size: int) -> LayerCache:
        latents = (("c", config.kv_lora_rank), ("kp", config.qk_rope_head_dim))
        kv = ops.alloc_pages(PagesSpec(latents, dtype, n_blocks, block_size, config.latents))
        if not full:
            return cls(kv, None)
        keys = PagesSpec((("k", config.index_head_dim),), dtype, n_blocks, block_size, config.keys)
        return cls(kv, ops.alloc_pages(keys))


class Indexer:
    """Selects the positions that each row attends to."""

    def __init__(self, ops: Binding, config: Config, load: Loader, prefix: str) -> None:
        c = config
        self.ops, self.config = ops, config
        self.wq_b = load.weight("index_prolog.wq_b", prefix + "wq_b.weight", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        self.wk = load.weight("index_prolog.wk", prefix + "wk.weight", c.index_head_dim, c.hidden_size)
        self.k_norm = load.array(prefix + "k_norm.weight", c.index_head_dim)
        self.k_bias = load.array(prefix + "k_norm.bias", c.index_head_dim)
        self.w_head = load.weight("index_prolog.w_head", prefix + "weights_proj.weight", c.index_n_heads, c.hidden_size)

    def __call__(self, qr: Any, h: Any, cache: LayerCache, batch: Batch) -> Selection:
        c = self.config
        iq, w, cache.keys = self.ops.index_prolog(
            qr,
            h,
            self.wq_b,
            self.wk,
            self.k_norm,
            self.k_bias,
            self.w_head,
            cache.keys,
            batch,
            theta=c.rope_theta,
            width=c.qk_rope_head_dim,
        )
        selection: Selection = self.ops.indexer_topk(iq, w, cache.keys, batch, k=c.index_topk, scale=c.index_scale)
        return selection


class Attention:
    """One layer's attention. A layer without an indexer of its own is given the selection of the nearest one below."""

    def __init__(
        self, ops: Binding, config: Config, load: Loader, prefix: str, full: bool, layout: Layout | None = None
    ) -> None:
        c, every = config, config.num_attention_heads
        share = layout.share(every) if layout and layout.tensor else slice(0, every)
        heads = share.stop - share.start
        self.comm = layout.comm if layout and layout.tensor else None  # of the ranks that have the other heads
        nope, rope, latent = c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
        self.ops, self.config = ops, config
        self.q_a = load.weight("mla_prolog.q_a", prefix + "q_a_proj.weight", c.q_lora_rank, c.hidden_size)
        self.q_norm = load.array(prefix + "q_a_layernorm.weight", c.q_lora_rank)
        mine = slice(share.start * (nope + rope), share.stop * (nope + rope))
        self.q_b = load.part("mla_prolog.q_b", prefix + "q_b_proj.weight", (every * (nope + rope), c.q_lora_rank), mine)
        self.kv_a = load.weight("mla_prolog.kv_a", prefix + "kv_a_proj_with_mqa.weight", latent + rope, c.hidden_size)
        self.kv_norm = load.array(prefix + "kv_a_layernorm.weight", latent)
        # kv_b stacks, per head, W_UK [nope, latent] over W_UV [v, latent].
        per_head = nope + c.v_head_dim
        mine = slice(share.start * per_head, share.stop * per_head)
        stacked = within(load.rows(prefix + "kv_b_proj.weight", (every * per_head, latent)), mine, every * per_head)

        def kv_b(rows: slice) -> Any:
            start, stop, _ = rows.indices(heads)
            return stacked(slice(start * per_head, stop * per_head)).reshape(stop - start, per_head, latent)

        self.w_uk = load.build("mla_prolog.w_uk", (heads, latent, nope), lambda r: kv_b(r)[:, :nope].swapaxes(1, 2))
        self.w_uv = load.build("mla_output.w_uv", (heads, c.v_head_dim, latent), lambda r: kv_b(r)[:, nope:])
        mine = slice(share.start * c.v_head_dim, share.stop * c.v_head_dim)
        self.w_o = load.part(
            "mla_output.w_o", prefix + "o_proj.weight", (c.hidden_size, every * c.v_head_dim), columns=mine
        )
        self.indexer = Indexer(ops, config, load, prefix + "indexer.") if full else None

    def __call__(
        self, h: Any, cache: LayerCache, batch: Batch, selection: Selection | None
    ) -> tuple[Any, Selection | None]:
        """(output, selection used); an indexer runs unless `selection` is given, as to an MTP layer that shares it."""
        c = self.config
        q_latent, q_rope, qr, cache.kv = self.ops.mla_prolog(
            h,
            self.q_a,
            self.q_norm,
            self.q_b,
            self.kv_a,
            self.kv_norm,
            self.w_uk,
            cache.kv,
            batch,
            theta=c.rope_theta,
            eps=c.latent_norm_eps,
        )
        if self.indexer and selection is None:
            selection = self.indexer(qr, h, cache, batch)
        o = self.ops.sparse_mla(q_latent, q_rope, cache.kv, selection, batch, scale=c.softmax_scale)
        y = self.ops.mla_output(o, self.w_uv, self.w_o)
        return self.ops.all_reduce(y, self.comm) if self.comm else y, selection
