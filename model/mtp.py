"""Multi-token prediction: one extra block, applied repeatedly, drafts the tokens after the next one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from porthal.hal import Batch, Binding, Selection, Weight
from porthal.model.attention import LayerCache
from porthal.model.checkpoint import Loader
from porthal.model.config import Config

if TYPE_CHECKING:
    from porthal.model.glm5 import Block


class Mtp:
    """u_i = eh_proj [enorm(embed t_{i+1}) | hnorm(g_i)]; g'_i = norm(block(u)_i); lm_head(g'_i) predicts t_{i+2}.

    g is the main model's post-norm hidden state, or g' of the step before. Row i has position i; the layer has pages and
    an indexer of its own. Source: DeepSeek-V3; GLM-5 stores the module once, as the layer after the last.
    """

    def __init__(self, ops: Binding, config: Config, load: Loader, prefix: str, block: Block) -> None:
        hidden = config.hidden_size
        self.ops, self.config, self.block = ops, config, block
        self.enorm = load.array(prefix + "enorm.weight", hidden)
        self.hnorm = load.array(prefix + "hnorm.weight", hidden)
        self.eh_proj = load.weight("mtp_input.eh_proj", prefix + "eh_proj.weight", hidden, 2 * hidden)
        self.norm = load.array(prefix + "shared_head.norm.weight", hidden)

    def hidden(
        self, ids: Any, embed: Weight, g: Any, batch: Batch, cache: LayerCache, selection: Selection | None
    ) -> tuple[Any, Selection | None]:
        """(g' [T, H], the selection used). ids[i] is the token after row i; a given selection is reused as it is."""
        eps = self.config.rms_norm_eps
        e = self.ops.embedding(ids, embed)
        u = self.ops.mtp_input(e, g, self.enorm, self.hnorm, self.eh_proj, eps=eps)
        h = self.ops.rms_norm(u, self.block.norm1, eps=eps)
        h, _, selection = self.block(h, u, cache, batch, selection, self.norm, batch.T)
        return h, selection
