"""Mistakes in the adapter of Moore Threads, and in what it shares with CUDA."""

from tests.planted_adapters import Mistake, edits

EXPERTS = "moe_experts,T=7,H=128,I=96,E=8,k=8,first_expert=3,x:bf16,w13%fp8_block,w2%fp8_block,0"
WIDE = "linear,T=33,K=1152,N=576,x:bf16,w%fp8_block,0"
SELECTED = "sparse_mla,T=7,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,kv%fp8_latents,batch=mixed,block_size=64,0"
KEYS = "indexer_scores,T=7,G=40,D=128,scale=0.125,iq:bf16,keys%fp8_keys,batch=mixed,block_size=64,0"
KEPT = 'vars(FLASH_MLA).setdefault("kept", FLASH_MLA.get_mla_metadata()[0])'
GROUPS = "grouped_gemm,M=64,K=96,N=96,E=8,x:fp16,w%fp8_block,0"
CHOSEN = "indexer_topk,T=33,G=40,D=128,k=2048,scale=0.125,iq:bf16,keys%fp8_keys,batch=mixed,block_size=64,0"
WRITTEN = "kv_write,T=7,A=128,pages:bf16,-second,-b,pages%fp8_keys,batch=padded,block_size=64,0"
PADDING = "kv_write,T=1,A=128,pages:bf16,-second,-b,pages%fp8_keys,batch=1/0,block_size=64,0"
MISTAKES = (
    Mistake("rms_norm", "epsilon left to the default", "(x, weight.shape, weight, eps)", "(x, weight.shape, weight, None)"),
    Mistake("add_rms_norm", "the residual left out", "r = x + residual", "r = x + 0 * residual"),
    Mistake("add_rms_norm", "the residual is the input", "weight, eps), r\n", "weight, eps), x\n"),
    Mistake("silu_mul", "the second half activated", "swish_glu(input=x)", "swish_glu(input=x.roll(x.shape[1] // 2, 1))"),
    Mistake("rope", "pairs not put into halves", "if pairs:\n            part = ", "if False:\n            part = "),
    Mistake("rope", "the result left with even elements first", "if pairs:\n            y = ", "if False:\n            y = "),
    Mistake("rope", "angles in pairs", "width).repeat(1, 2)", "width).repeat_interleave(2, 1)"),
    Mistake("rope", "angles of another theta", ".positions, theta, width)", ".positions, 1e4, width)"),
    Mistake("rope", "the flag for MLA set", "multi_latent_attention=False", "multi_latent_attention=True"),
    Mistake("moe_route", "weights not normalised", "scale * s / (s.sum(-1, keepdim=True) + 1e-20)", "scale * s", dtype=""),
    Mistake("moe_route", "the factor not applied", "return ids, scale * s", "return ids, s", dtype=""),
    Mistake("moe_route", "no bias", "bias=bias", "bias=torch.zeros_like(bias)", dtype=""),
    Mistake("sparse_mla", "positions for slots", "return positions + moves[", "return positions + 0 * moves[", "slots"),
    Mistake("sparse_mla", "pages of another size", "_moves, batch.block_size)", "_moves, 64)", "slots"),
    Mistake("sparse_mla", "pages of the first request", "plan.row_request[:, None]", "0 * plan.row_request[:, None]", "slots"),
    Mistake("sparse_mla", "the scale left out", "sm_scale=scale", "sm_scale=1.0", "flash_mla"),
    Mistake("sparse_mla", "the parts of a query swapped", "= q_latent, q_rope", "= q_latent, q_rope.flip(-1)", "flash_mla"),
    Mistake("sparse_mla", "blocks not filled up", "-slots.shape[1] % BLOCK", "0", "flash_mla"),
    Mistake("sparse_mla", "heads not filled up", "64 if heads <= 64 else 128, 576", "heads, 576", "flash_mla"),
    Mistake(
        "sparse_mla", "the fields of the cache in another order", "rows.split(widths", "rows.roll(64, 1).split(widths", "slots"
    ),
    Mistake("grouped_gemm", "groups not aligned", "step = int(DEEP", "step = 1 + 0 * int(DEEP", "deep_gemm"),
    Mistake("grouped_gemm", "gaps for their sums", "gaps.cumsum(0) - gaps", "gaps", "deep_gemm"),
    Mistake("grouped_gemm", "counts for their sums", "(counts.cumsum(0), position", "(counts, position", "deep_gemm"),
    Mistake("moe_experts", "the other weight twice", "_product(h, w2, rows)", "_product(h, w13, rows)", "deep_gemm"),
    Mistake("moe_experts", "ids of other ranks", "ids - first_expert", "ids + 0", "deep_gemm"),
    Mistake("moe_experts", "weights left out", "(weights[part, :, None] * chosen.float())", "chosen.float()", "deep_gemm"),
    Mistake("moe_experts", "a row for its choice", "choice // k", "choice % len(x)", "deep_gemm"),
)
FP8 = (
    *edits("deep_gemm", WIDE)(
        ("a scale for all of a row", 'scheme_of("fp8_group")', 'scheme_of("int8_token")'),
        ("scales of rows left out", 'parts["scale"]', 'torch.ones_like(parts["scale"])'),
        ("scales of blocks in the other order", 'w.native["scale"]', 'w.native["scale"].flip(-1)'),
        ("ragged rows scaled as those before", 'w.native["scale"]', 'w.native["scale"][[0, 1, 2, 3, 3]]'),
    ),
    *edits("deep_gemm", GROUPS)(
        ("scales of the first expert", 'w.native["scale"]', 'w.native["scale"][:1].repeat(len(w.native["scale"]), 1, 1)'),
        ("an expert for a row of none", "held(w), y[:-1], rows.expert", "held(w), y[:-1], rows.expert.clamp(min=0)"),
        ("codes taken for numbers", "codes_of(x), held(w)", "(codes_of(x)[0], torch.ones_like(codes_of(x)[1])), held(w)"),
    ),
    *edits("deep_gemm_fp8", EXPERTS)(
        ("ids of all ranks", "ids - first_expert", "ids + 0"),
        ("the first product twice", "x, w13, w2, ids", "x, w13, w13, ids"),
    ),
    *edits("deep_gemm_fp8", KEYS)(
        ("scales of the queries left out", "* factor[..., 0]", ""),
        ("one scale for all heads", "factor[..., 0]", "factor[:, :1, 0]"),
        ("the scale left out", "F.pad(scale * w", "F.pad(1.0 * w"),
        ("heads beyond 32 dropped", "(32 if iq.shape[1] <= 32 else 64)", "32"),
        ("a key less", "length = visible.clamp(min=1)", "length = (visible - 1).clamp(min=1)"),
        ("what is behind the last key left", "scores.masked_fill(position >= visible, -torch.inf)", "scores"),
        ("the pages of the first request", "plan.row_request[rows])", "plan.row_request[rows] * 0)"),
        ("a schedule of other lengths", "metadata(length,", "metadata(length + 999,"),
    ),
    *edits("deep_gemm_fp8", CHOSEN)(
        ("all keys of a request", "native.visible[rows], k)", "native.kv_len[batch.native.row_request[rows]], k)"),
    ),
    *edits("packed", WRITTEN)(
        ("slots across pages", "// field.shape[1], targets % field.shape[1]", "% field.shape[0], targets // field.shape[0]"),
        (
            "scales not written",
            "in stored(pages, name, rows.index_select(0, plan.written)).items():",
            "in list(stored(pages, name, rows.index_select(0, plan.written)).items())[:1]:",
        ),
    ),
    *edits("packed", PADDING)(("padding written to slot 0", "torch.where(kept, value, field[at])", "value"),),
    *edits("packed", KEYS)(("scales beside each slot's codes", "size = spec.block_size if layout.by_page else 1", "size = 1"),),
    *edits("flash_mla", SELECTED)(
        ("scales last, as Ascend has them", "return FLASHMLA if", 'return Layout(("c", "kp", "c_scale")) if'),
        ("the scale left to the default", "softmax_scale=scale", "softmax_scale=None"),
        ("a schedule that is kept", "FLASH_MLA.get_mla_metadata()[0]", KEPT),
        ("the rotated part first", "q[:, :heads, :width], q[:, :heads, width:] =", "q[:, :heads, 64:], q[:, :heads, :64] ="),
    ),
    *edits("slots", SELECTED)(("positions for slots", "return positions + moves[", "return positions + 0 * moves["),),
)
MISTAKES += FP8
