"""Stand-in for what Kunlunxin ships for GLM-5: kunlun_ops, xspeedgate_ops, torch_xmlir. Modules alone: tensors stay on `cpu`.

PyTorch calls this chip `cuda`, a name that a PyTorch without CUDA cannot give away, so no device is emulated: the
functions run on tensors of the CPU, and whether an adapter keeps its tensors on the chip is not seen here. All is known
from call sites only: those of baidu/vLLM-Kunlun f3afc19, vllm-kunlun 0.11.1 and baidu-baige/sglang-kunlun, with what
their comments say was measured on a P800. An argument that is only ever passed by name takes no place here, one that is
always passed has no default, and what no call shows is refused. What they leave undefined comes back as garbage, equal
scores are taken from the highest place down, and the chosen are in no order. Results are from an emulation, never from
hardware.
"""

import types

from porthal.backends.kunlunxin.emulated import attention, cache, experts, indexer, vectors
from porthal.backends.torch.emulation.stand_in import calls, counted, define, publish

__all__ = ["CONFIDENCE", "KUNLUN_OPS", "SCHEMAS", "calls", "install"]

_VLLM, _OPS = "baidu/vLLM-Kunlun f3afc19", "vllm_kunlun/ops/_custom_ops.py"
KUNLUN_OPS = {name: getattr(module, name) for module, names in (
    (vectors, ("rmsnorm", "add_rmsnorm", "swiglu", "silu_and_mul", "rotary_embedding", "quant2d", "matmul")),
    (cache, ("concat_and_cache_mla",)),
    (attention, ("sparse_prefill_fwd_opt", "fwd_kvcache_mla")),
    (indexer, ("I8_mqa_logits", "I8_paged_mqa_logits", "fast_topkv2")),
    (experts, ("moe_sigmoid_group_topk_norm", "gen_block_statistic", "moe_pre_sorted", "moe_fc", "moe_post")),
) for name in names}
# torch.ops.xspeedgate_ops: names and order from the calls, types from what is passed.
SCHEMAS = (
    "moe_pre_small(Tensor topk_ids, int expert_num, bool index_have_neg, bool sort_mode, Tensor x) -> (Tensor, Tensor, Tensor)",
    "mask_for_I8_mqa_logits(*, int seq_len_kv, Tensor cu_seqlen_ks, Tensor cu_seqlen_ke, Tensor(a!) logits) -> ()",
    "topk_per_row(*, Tensor logits, Tensor(a!) srcIndices, int numRows, int stride0, int stride1, int topK, Tensor? rowStarts, "
    "Tensor? rowEnds, Tensor? seqLens, int? next_n) -> ()",
    "convert_req_index_to_global_index(*, Tensor req_id, Tensor block_table, Tensor token_indices, int block_size, "
    "int num_topk_tokens) -> Tensor",
    "indexer_k_quant_and_cache(Tensor k, Tensor(a!) kv_cache, Tensor slot_mapping, int quant_block_size, str? scale_fmt) -> ()",
    "cp_gather_indexer_k_quant_cache(*, Tensor kv_cache, Tensor(a!) dst_k, Tensor(b!) dst_scale, Tensor block_table, "
    "Tensor cu_seq_lens) -> ()",
    "flashinfer_rotary_embedding(*, Tensor positions, int rotary_dim, int head_size, Tensor cos_sin_cache, "
    "bool is_neox_style, Tensor(a!) query, Tensor(b!)? key, Tensor? offsets) -> (Tensor, Tensor)",
)
_XSPEEDGATE = {name: getattr(module, name) for module, names in (
    (experts, ("moe_pre_small",)), (indexer, ("mask_for_I8_mqa_logits", "topk_per_row")),
    (cache, ("convert_req_index_to_global_index", "indexer_k_quant_and_cache", "cp_gather_indexer_k_quant_cache")),
    (vectors, ("flashinfer_rotary_embedding",))) for name in names}
# How well a function's signature is known, C for call sites, and where they stand.
CONFIDENCE = {
    **{f"kunlun_ops.{name}": ("C", f"{_VLLM} {_OPS}") for name in KUNLUN_OPS},
    "kunlun_ops.silu_and_mul": ("C", f"{_VLLM} vllm_kunlun/ops/_kunlun_ops.py, in a function that nothing calls"),
    "xspeedgate_ops.moe_pre_small": ("C", f"{_VLLM} vllm_kunlun/ops/_kunlun_ops.py"),
    "xspeedgate_ops.mask_for_I8_mqa_logits": ("C", f"{_VLLM} vllm_kunlun/ops/deep_gemm.py; its traps: sglang-kunlun"),
    "xspeedgate_ops.convert_req_index_to_global_index": (
        "C", f"{_VLLM} vllm_kunlun/v1/attention/backends/mla/flashmla_sparse.py"),
    "xspeedgate_ops.flashinfer_rotary_embedding": ("C", f"{_VLLM} vllm_kunlun/ops/rotary_embedding/kunlun_deepseek_rope.py"),
    **{f"xspeedgate_ops.{name}": ("C", f"{_VLLM} vllm_kunlun/models/deepseek_v2.py")
       for name in ("topk_per_row", "indexer_k_quant_and_cache", "cp_gather_indexer_k_quant_cache")},
}
_installed: types.ModuleType | None = None


def install(count: int = 1) -> types.ModuleType:
    """Put the modules where imports find them, on a machine said to have `count` chips, and return kunlun_ops.

    Raises RuntimeError if the vendor's own packages are loaded.
    """
    global _installed
    if _installed is None:
        publish("torch_xmlir", __doc__, {"__version__": "1.0.0.1+emulated_modules",
                                         "xpu": types.SimpleNamespace(device_count=lambda: count)})
        publish("xspeedgate_ops", __doc__, {"__version__": "1.1.0+emulated_modules"})
        define("xspeedgate_ops", SCHEMAS, _XSPEEDGATE, "CPU")
        _installed = publish("kunlun_ops", __doc__, {"__version__": "0.1.58+emulated_modules",
                                                     **{name: counted(name, f) for name, f in KUNLUN_OPS.items()}})
    return _installed
