"""The forward pass: embedding, blocks, final norm, logits. Knows no backend; every computation is an op of the binding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from porthal.hal import Batch, Binding, Selection
from porthal.model.attention import Attention, LayerCache
from porthal.model.cache import Cache
from porthal.model.checkpoint import Loader, Source
from porthal.model.config import Config
from porthal.model.experts import DenseMlp, MoeMlp
from porthal.model.layout import Layout, Part
from porthal.model.mtp import Mtp
from porthal.model.tokens import Array, check_count, check_ids, ids_array, stack_rows


class Block:
    """x += attention(norm1 x); x += mlp(norm2 x), with the residual add fused into the following norm."""

    def __init__(
        self, ops: Binding, config: Config, load: Loader, layer: int, dense: bool, full: bool, layout: Layout | None
    ) -> None:
        prefix = f"model.layers.{layer}."
        self.ops, self.config, self.full = ops, config, full
        self.norm1 = load.array(prefix + "input_layernorm.weight", config.hidden_size)
        self.norm2 = load.array(prefix + "post_attention_layernorm.weight", config.hidden_size)
        self.attention = Attention(ops, config, load, prefix + "self_attn.", full, layout)
        self.mlp = (DenseMlp if dense else MoeMlp)(ops, config, load, prefix + "mlp.", layout)

    def __call__(
        self,
        h: Any,
        x: Any,
        cache: LayerCache,
        batch: Batch | None,
        selection: Selection | None,
        next_norm: Any,
        total: int,
    ) -> tuple[Any, Any, Selection | None]:
        """From (norm1 x, x) to (next_norm x', x', selection used). A rank without rows has no batch; all have `total`."""
        eps = self.config.rms_norm_eps
        attended, selection = self.attention(h, cache, batch, selection) if batch else (h, None)
        h, x = self.ops.add_rms_norm(attended, x, self.norm2, eps=eps)
        h, x = self.ops.add_rms_norm(self.mlp(h, total), x, next_norm, eps=eps)
        return h, x, selection


class Glm5:
    """A GLM-5 model in one binding's layouts: its weights and caches work with that binding only.

    dtype is that of activations, weights and caches: "float32", "bfloat16" or "float16". block_size is the number of
    tokens in a cache page; backends state which they take. Tensors of `kept` stay codes, of these schemes.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        binding: Binding,
        dtype: str = "float32",
        block_size: int = 64,
        layout: Layout | None = None,
        kept: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.config, self.ops, self.dtype, self.block_size, self.layout = config, binding, dtype, block_size, layout
        if layout:
            layout.fits(config)
        load = Loader(source, binding, dtype, kept)
        hidden = config.hidden_size
        self.embed = load.weight("embedding.table", "model.embed_tokens.weight", config.vocab_size, hidden)
        self.blocks = [
            Block(binding, config, load, i, config.dense[i], config.indexer_types[i] == "full", layout)
            for i in range(config.num_hidden_layers)
        ]
        self.norm = load.array("model.norm.weight", hidden)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self.lm_head = load.weight("linear.w", head, config.vocab_size, hidden)
        mtp = f"model.layers.{config.num_hidden_layers}."
        self.mtp = None
        if config.has_mtp and source.holds(mtp):
            block = Block(binding, config, load, config.num_hidden_layers, False, True, layout and layout.replicated())
            self.mtp = Mtp(binding, config, load, mtp, block)

    # -- one step ----------------------------------------------------------------------------------------------------

    def hidden(self, ids: Any, batch: Batch, cache: Cache) -> Any:
        """Post-norm hidden states [T, H] of a batch's rows; writes their keys into the cache."""
        x, total = self.ops.embedding(ids, self.embed), batch.T
        part = Part.of(self.ops, self.layout, batch) if self.layout and self.layout.data else None
        if part:
            x = part.taken(self.ops, x)
        h = self.ops.rms_norm(x, self.blocks[0].norm1, eps=self.config.rms_norm_eps)
        norms = [*(b.norm1 for b in self.blocks[1:]), self.norm]
        selection: Selection | None = None
        for block, pages, norm in zip(self.blocks, cache.layers, norms):
            rows = part.batch if part else batch
            h, x, selection = block(h, x, pages, rows, None if block.full else selection, norm, total)
        return part.whole(self.ops, self.layout, h) if part and self.layout else h

    def logits(self, hidden: Any) -> Any:
        """float32 logits [T, vocab] of post-norm hidden states."""
        return self.ops.linear(hidden, self.lm_head, out="float32")

    def new_cache(self, lengths: Sequence[int]) -> Cache:
        """Pages in every layer for requests of these lengths; the MTP layer's come last."""
        full = [block.full for block in self.blocks] + ([True] if self.mtp else [])
        n_blocks = max(1, sum(-(-length // self.block_size) for length in lengths))
        layers = [
            LayerCache.alloc(self.ops, self.config, f, self.dtype, n_blocks, self.block_size) for f in full
        ]
        return Cache(layers, n_blocks, self.block_size)

    # -- whole texts -------------------------------------------------------------------------------------------------

    def forward(self, tokens: Sequence[int], *, chunk: int | None = None) -> Array:
        """float32 logits [T, vocab] of every position of one text, prefilled at once or in chunks of `chunk` tokens."""
        ids = check_ids(tokens, self.config.vocab_size, self.config.max_position_embeddings)
        chunk = len(ids) if chunk is None else check_count("chunk", chunk, 1)
        cache = self.new_cache([len(ids)])
        request = cache.new_request()
        parts = []
        for start in range(0, len(ids), chunk):
            piece = ids[start : start + chunk]
            batch = self.ops.plan(cache.step([request], [len(piece)]))
            hidden = self.hidden(self.ops.from_numpy(ids_array(piece)), batch, cache)
            parts.append(self.ops.to_numpy(self.logits(hidden)))
        return stack_rows(parts)

    def generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float | None = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        speculative: int = 0,
        seed: int = 0,
    ) -> list[int]:
        """New tokens after `tokens`, greedy at temperature 0, up to an end-of-text token or max_new_tokens.

        For the other settings, and errors, see `porthal.model.generate.generate`.
        """
        from porthal.model.generate import generate

        settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        return generate(self, [tokens], max_new_tokens, **settings, speculative=speculative, seed=seed).tokens[0]
