"""Mistakes in the adapter of Cambricon."""

from tests.planted_adapters import Mistake, edits

LINEAR = "linear,T=7,K=96,N=256,x:bf16,w%int8_channel,0"
GROUPS = "grouped_gemm,M=33,K=150,N=200,E=8,x:bf16,w%int8_channel,0"
EXPERTS = "moe_experts,T=7,H=96,I=96,E=8,k=8,first_expert=3,x:fp16,w13%int8_channel,w2%int8_channel,0"
PLAIN = "moe_experts,T=7,H=96,I=96,E=8,k=8,first_expert=3,x:bf16,ids~away,0"
LATENTS = "kv_write,T=7,A=128,B=64,pages:fp16,first~uneven,pages%int8_latents,batch=padded,block_size=64,0"
KEYS = "indexer_topk,T=7,G=40,D=128,k=16,scale=0.0156,iq:bf16,w:fp32,keys%int8_keys,batch=mixed,block_size=64,0"
HEADED = "sparse_mla,T=3,N=130,C=512,R=64,k=16,scale=0.0625,q_latent:fp16,batch=mixed,block_size=64,0"
PADDED = "indexer_topk,T=7,G=8,D=128,k=16,scale=0.0156,iq:bf16,batch=padded,block_size=64,0"
MISTAKES = (
    Mistake("add_rms_norm", "the residual left out", "(x, residual, weight", "(x, torch.zeros_like(x), weight"),
    Mistake("layer_norm", "no bias", "weight, bias, None", "weight, torch.zeros_like(bias), None"),
    Mistake("silu_mul", "another activation", 'TMO.active(x, "silu"', 'TMO.active(x, "gelu"'),
    Mistake("rope", "cosine before sine", "angle.sin(), angle.cos()", "angle.cos(), angle.sin()"),
    Mistake("rope", "pairs for halves", "None, pairs, True", "None, not pairs, True"),
    Mistake("rope", "one row of the table for all", "place, None, pairs, True", "torch.zeros_like(place), None, pairs, True"),
    Mistake("rope", "turned in place", "to(torch.float32, copy=True)", "to(torch.float32)", dtype="float32"),
    Mistake("moe_route", "divided by the op", "k, False, -1, 0", "k, True, -1, 0", dtype=""),
    Mistake("moe_route", "the scale left out", "scale * s /", "s /", dtype=""),
    Mistake("moe_route", "no bias", "score_bias=bias", "score_bias=None", dtype=""),
    Mistake(
        "grouped_gemm", "sums for counts", "product(x, w, counts)\n", "product(x, w, counts.cumsum(0, dtype=torch.int32))\n"
    ),
    Mistake("grouped_gemm", "weights the other way", "x.contiguous(), w.native,",
             "x.contiguous(), w.native.transpose(1, 2),", "calls"),
    Mistake("moe_unpermute", "weights left out", "rows, weights, combine", "rows, torch.ones_like(weights), combine"),
    Mistake("moe_unpermute", "the order of rows for their places", "combine[:-1], None", "source, None"),
    Mistake("moe_unpermute", "rows that stand for none left as they are", "torch.where(filled[:, None], sorted, 0)", "sorted"),
    Mistake("moe_experts", "ids of other ranks kept", "ids - first_expert", "ids + 0"),
    Mistake("moe_experts", "no expert behind the last", "(ids < E), ids, E)", "(ids < E), ids, E - 1)", "calls"),
    Mistake("moe_experts", "the other weight twice", "product(h, w2, counts", "product(h, w13, counts", "calls"),
    Mistake("moe_experts", "rows for places", "weights, combine, None, ends", "weights, expand, None, ends", "calls"),
    Mistake("kv_write", "all slots, in the order of rows", "None, slots)", "None, slots.sort().values)"),
    Mistake("kv_write", "padded rows written to slot 0", "None, slots)", "None, slots.clamp(min=0))"),
    Mistake("kv_write", "the fields swapped", "torch.cat([first, second]", "torch.cat([second, first]"),
    Mistake("indexer_topk", "all keys of a request", "_lens=plan.visible", "_lens=plan.kv_len[plan.row_request]", "calls"),
    Mistake("indexer_topk", "another table for slots", "kv_cache_block_table=pages", "kv_cache_block_table=1 + pages", "calls"),
    Mistake("indexer_topk", "no weights", "weights=F.pad(w,", "weights=F.pad(torch.ones_like(w),", "calls"),
    Mistake("indexer_topk", "pages for their places", "(place.gather(1, found) *", "(slots // native.size *", "slots"),
    Mistake("sparse_mla", "all of the table", "into, slots, length,", "into, slots, torch.full_like(length, slots.shape[1]),"),
    Mistake("sparse_mla", "the scale left out", "-1, -1, scale, False", "-1, -1, 1.0, False"),
    Mistake(
        "sparse_mla", "rows without keys left as they are", "length[:, None, None] > 0, out", "length[:, None, None] >= -1, out"
    ),
    Mistake("sparse_mla", "positions for slots", "return positions + moves[", "return positions + 0 * moves[", "slots"),
    *edits("calls", LINEAR)(
        ("codes of float8", "quant_type=torch.int8", "quant_type=torch.float8_e4m3fn"),
        ("no scales of rows", "    return codes, scale", "    return codes, torch.ones_like(scale)"),
    ),
    *edits("int8", LINEAR)(("scales of the weight backwards", "scale, per_row, x.dtype", "scale, per_row.flip(0), x.dtype"),),
    *edits("calls", GROUPS)(
        ("scales of the experts backwards", "scale, held[1], x.dtype", "scale, held[1].flip(0), x.dtype"),
        ("sums for counts", "held[0], counts, None", "held[0], counts.cumsum(0, dtype=torch.int32), None"),
    ),
    *edits("int8", EXPERTS)(
        ("ids of all ranks", "ids - first_expert", "ids + 0"),
        ("the first product twice", "x, w13, w2, ids", "x, w13, w13, ids"),
    ),
    *edits("int8", LATENTS)(
        ("codes in the order of slots", "scale, None, slots)", "scale, None, slots.sort().values)"),
        ("rows of padding", "first.index_select(0, plan.written)", "first.roll(1, 0)"),
        ("padding's second part to slot 0", "plan.table(int32_slots)[0])", "plan.table(int32_slots)[0].clamp(min=0))"),
    ),
    *edits("calls", KEYS)(
        ("scales of the queries left out", "q_scale=query_scale", "q_scale=torch.ones_like(query_scale)"),
        ("scales of heads backwards", "query_scale = query_scale[..., None]", "query_scale = query_scale.flip(-1)[..., None]"),
    ),
    *edits("int8", KEYS)(("scales of other slots", 'keys["k_scale"]', 'keys["k_scale"].roll(1, 0)'),),
    *edits("calls", PADDED)(
        ("what it says of rows without keys", "torch.minimum(length.clamp(min=0), plan.visible.clamp(max=k))", "length"),
    ),
    *edits("backend", HEADED)(("more heads than a call takes", "torch.float16: 128", "torch.float16: 256"),),
)
