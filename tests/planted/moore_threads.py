"""Mistakes in the adapter of Moore Threads, and in what it shares with CUDA."""

from tests.planted_adapters import Mistake

MISTAKES = (
    Mistake("rms_norm", "epsilon left to the default", "weight, eps)", "weight, None)"),
    Mistake("silu_mul", "the second half activated", "swish_glu(input=x)", "swish_glu(input=x.roll(x.shape[1] // 2, 1))"),
    Mistake("rope", "pairs not put into halves", "if pairs:\n            part = ", "if False:\n            part = "),
    Mistake("rope", "the result left with even elements first", "if pairs:\n            y = ", "if False:\n            y = "),
    Mistake("rope", "angles in pairs", "width).repeat(1, 2)", "width).repeat_interleave(2, 1)"),
    Mistake("rope", "angles of another theta", ".positions, theta, width)", ".positions, 1e4, width)"),
    Mistake("rope", "the flag for MLA set", "multi_latent_attention=False", "multi_latent_attention=True"),
    Mistake("moe_route", "weights not normalised", "scale * s / (s.sum(-1, keepdim=True) + 1e-20)", "scale * s", dtype=""),
    Mistake("moe_route", "the factor not applied", "return ids, scale * s", "return ids, s", dtype=""),
    Mistake("moe_route", "no bias", "bias=bias", "bias=torch.zeros_like(bias)", dtype=""),
    Mistake("sparse_mla", "positions for slots", "page * size + position % size, -1)", "position, -1)", "slots"),
    Mistake("sparse_mla", "pages of another size", "(position // size)", "(position // 64)", "slots"),
    Mistake("sparse_mla", "the scale left out", "sm_scale=scale", "sm_scale=1.0", "flash_mla"),
    Mistake("sparse_mla", "the parts of a query swapped", "= q_latent, q_rope", "= q_latent, q_rope.flip(-1)", "flash_mla"),
    Mistake("sparse_mla", "blocks not filled up", "-slots.shape[1] % BLOCK", "0", "flash_mla"),
    Mistake("sparse_mla", "heads not filled up", "64 if heads <= 64 else 128, 576", "heads, 576", "flash_mla"),
    Mistake(
        "sparse_mla", "the fields of the cache in another order", "rows.split(widths", "rows.roll(64, 1).split(widths", "slots"
    ),
    Mistake("grouped_gemm", "groups not aligned", "step = int(DEEP", "step = 1 + 0 * int(DEEP", "deep_gemm"),
    Mistake("grouped_gemm", "counts for their sums", "// step * step).cumsum(0)", "// step * step)", "deep_gemm"),
    Mistake(
        "grouped_gemm", "every expert's rows from the first", "(counts.cumsum(0) - counts)", "(counts - counts)", "deep_gemm"
    ),
    Mistake("moe_experts", "the other weight twice", "_product(h, w2, rows)", "_product(h, w13, rows)", "deep_gemm"),
    Mistake("moe_experts", "ids of other ranks", "first_expert)", "0)", "deep_gemm"),
    Mistake("moe_experts", "weights left out", "places, weights)", "places, torch.ones_like(weights))", "deep_gemm"),
    Mistake("moe_experts", "a row for its choice", "_row_of(places, ids.shape[1])", "places", "deep_gemm"),
)
