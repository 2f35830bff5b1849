"""torch_npu's ops as the adapter calls them: by keyword alone."""

from porthal.backends.torch.interfaces.library import Library
from porthal.hal import one_of

FLOATS = one_of("float32", "bfloat16", "float16")
HALVES = one_of("bfloat16", "float16")

NPU = Library(
    "torch_npu",
    wanted="torch-npu 2.13, for CANN 8.5 or later",
    # rows
    npu_rms_norm="input gamma epsilon",
    npu_add_rms_norm="x1 x2 gamma epsilon",
    npu_rotary_mul="input r1 r2 rotary_mode",
    npu_swiglu="input dim",
    npu_scatter_nd_update_="input indices updates",
    # experts
    npu_moe_gating_top_k="x k bias k_group group_count renorm norm_type routed_scaling_factor eps",
    npu_moe_init_routing_v2="x expert_idx active_num expert_num drop_pad_mode expert_tokens_num_type expert_tokens_num_flag "
    "quant_mode active_expert_range row_idx_type",
    npu_grouped_matmul="x weight scale per_token_scale output_dtype group_list split_item group_type group_list_type",
    npu_moe_token_unpermute="permuted_tokens sorted_indices probs",
    # attention
    npu_lightning_indexer="query key weights actual_seq_lengths_query actual_seq_lengths_key block_table layout_query "
    "layout_key sparse_count sparse_mode",
    npu_sparse_flash_attention="query key value sparse_indices scale_value block_table actual_seq_lengths_query "
    "actual_seq_lengths_kv query_rope key_rope sparse_block_size layout_query layout_kv sparse_mode attention_mode",
    npu_mla_prolog_v3="token_x weight_dq weight_uq_qr weight_uk weight_dkv_kr rmsnorm_gamma_cq rmsnorm_gamma_ckv rope_sin "
    "rope_cos kv_cache kr_cache cache_index rmsnorm_epsilon_cq rmsnorm_epsilon_ckv cache_mode query_norm_flag",
    npu_format_cast="input acl_format",
    # int8
    npu_dynamic_quant="input",
    npu_quant_matmul="x1 x2 scale pertoken_scale output_dtype",
    npu_grouped_matmul_swiglu_quant_v2="x weight weight_scale x_scale group_list dequant_mode dequant_dtype quant_mode "
    "quant_dtype group_list_type",
    npu_quant_lightning_indexer="query key weights query_dequant_scale key_dequant_scale query_quant_mode key_quant_mode "
    "actual_seq_lengths_query actual_seq_lengths_key block_table layout_query layout_key sparse_count sparse_mode",
    npu_kv_quant_sparse_flash_attention="query key value sparse_indices scale_value key_quant_mode value_quant_mode "
    "block_table actual_seq_lengths_query actual_seq_lengths_kv sparse_block_size layout_query layout_kv sparse_mode "
    "attention_mode quant_scale_repo_mode tile_size rope_head_dim",
)
