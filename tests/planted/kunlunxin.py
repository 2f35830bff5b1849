"""Mistakes in the adapter of Kunlunxin."""

from tests.planted_adapters import Mistake, edits

LINEAR = "linear,T=7,K=96,N=256,x:bf16,w%int8_channel,0"
EXPERTS = "moe_experts,T=7,H=96,I=96,E=8,k=8,first_expert=3,x:fp16,w13%int8_channel,w2%int8_channel,0"
PLAIN = "moe_experts,T=7,H=96,I=96,E=8,k=8,first_expert=3,x:bf16,ids~away,0"
WRITTEN = "kv_write,T=7,A=128,pages:fp16,-second,-b,first~uneven,pages%int8_keys,batch=padded,block_size=64,0"
KEYS = "indexer_scores,T=7,G=8,D=128,scale=0.125,keys%int8_keys,batch=mixed,block_size=16,0"
CHOSEN = "indexer_topk,T=33,G=8,D=128,k=2048,scale=0.125,keys%int8_keys,batch=mixed,block_size=64,0"
MISTAKES = (
    Mistake("rms_norm", "another epsilon", "weight.contiguous(), y, eps)", "weight.contiguous(), y, 1e-6)"),
    Mistake("add_rms_norm", "the sum not kept", "residual_output=r, weight", "residual_output=torch.empty_like(r), weight"),
    Mistake("silu_mul", "the second half activated", "x=x.contiguous(), y=y", "x=x.roll(x.shape[1] // 2, 1), y=y"),
    Mistake("layer_norm", "the bias left out", "weight.float(), bias.float(), eps", "weight.float(), None, eps"),
    Mistake("rope", "sine before cosine", "[angle.cos(), angle.sin()]", "[angle.sin(), angle.cos()]"),
    Mistake("rope", "pairs for halves", 'layout == "half"', 'layout != "half"'),
    Mistake("rope", "turned in place", "to(torch.float32, copy=True)", "to(torch.float32)", dtype="float32"),
    Mistake("moe_route", "the op's weights", "scale * s / (s.sum(-1, keepdim=True) + 1e-20)", "weights", dtype=""),
    Mistake("kv_write", "the parts swapped", "k_pe=second.contiguous()", "k_pe=second.flip(-1).contiguous()"),
    Mistake("kv_write", "slots in order", "slot_mapping=plan.targets", "slot_mapping=plan.targets.sort().values"),
    Mistake("topk", "as many as there are", "length[:, None]\n        return", "length[:, None] - 1\n        return", dtype=""),
    Mistake("topk", "NaN left to the op", "score=_ordered(scores)", "score=scores.contiguous()", dtype=""),
    Mistake("sparse_mla", "positions for slots", "indices=slots[:, None]", "indices=rows.indices[:, None]"),
    Mistake(
        "sparse_mla", "the whole of a row", "kv_lod_xpu=rows.length", "kv_lod_xpu=torch.full_like(rows.length, sel.spec.k)",
    ),
    Mistake("sparse_mla", "the scale left out", "softmax_scale=scale", "softmax_scale=1.0"),
    Mistake(
        "sparse_mla", "rows without keys left as they are", "rows.length[:, None, None] > 0", "rows.length[:, None, None] >= 0",
    ),
    *edits("calls", PLAIN)(
        ("places of other ranks counted", "torch.where(counted[:, None], y, 0)", "y"),
        ("the other weight twice", "chip.silu_mul(h), w2", "chip.silu_mul(h), w13"),
        ("no weights", "weights.contiguous()", "kept.float()"),
    ),
    Mistake("moe_experts", "ids of other ranks kept", "ids - first_expert", "ids + 0", "backend", "", PLAIN),
    *edits("calls", EXPERTS)(
        ("largest magnitudes taken for scales", "* 127).contiguous()", "* 1).contiguous()"),
        ("magnitudes of rows backwards", '"x_perchannel_max": top', '"x_perchannel_max": top.flip(0)'),
        ("magnitudes of weights left out", '"w_perchannel_max": largest(w)', '"w_perchannel_max": torch.ones_like(largest(w))'),
    ),
    *edits("int8", LINEAR)(
        ("the weight's magnitudes backwards", "w_pc_max=largest(w)", "w_pc_max=largest(w).flip(0)"),
        ("the rows' magnitudes left out", "x_pc_max=top", "x_pc_max=torch.ones_like(top)"),
    ),
    *edits("int8", EXPERTS)(
        ("the first product twice", "x, w13, w2, ids", "x, w13, w13, ids"),
        ("ids of all ranks", "ids - first_expert", "ids + 0"),
    ),
    *edits("int8", WRITTEN)(
        ("slots in order", "cache, plan.targets,", "cache, plan.targets.sort().values,"),
        ("rows of padding", "first.index_select(0, plan.written)", "first.roll(1, 0)"),
        ("every row for those that are written", "first.index_select(0, plan.written)", "first"),
        ("codes and scales of each slot side by side", "return DEEPGEMM if", 'return Layout(("k", "k_scale")) if'),
    ),
    *edits("int8", KEYS)(
        ("magnitudes of the queries taken for scales", "(top / 127)", "(top / 1)"),
        ("one magnitude for all heads", "(top / 127).view(T, heads)", "(top / 127).view(T, heads)[:, :1]"),
        ("scales of the keys in the order of slots", "table.flatten())", "table.flatten().sort().values)"),
        ("lengths of a request", "visible[:, 0].clamp(min=1)),", "plan.kv_len[plan.row_request[rows]]),"),
        ("pages of the first request", "plan.row_request[rows])", "0 * plan.row_request[rows])"),
        ("what is behind the last key left", ".masked_fill(position >= visible, -torch.inf)", ""),
    ),
    *edits("int8", CHOSEN)(
        ("all keys of a request", "native.visible[rows], k)", "native.kv_len[batch.native.row_request[rows]], k)"),
    ),
)
