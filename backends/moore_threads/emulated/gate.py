"""MATE's router: sigmoid, a bias for the choice, groups, top-k, and the weights of the chosen."""

import math

import torch

from porthal.backends.torch.emulation.stand_in import highest, need, need_absent, need_dtype, need_rank, need_shape

_COMPILED = {(384, 8), (384, 16), (384, 1), (256, 8), (256, 16), (256, 1), (128, 4), (128, 8), (160, 1), (160, 8)}


def moe_fused_gate(input, bias, num_expert_group, topk_group, topk, num_fused_shared_experts, routed_scaling_factor,
                   renormalize, apply_routed_scaling_factor_on_output, num_token_non_padded=0, static_index_map=None,
                   dynamic_index_map=None, dynamic_index_map_valid=None, random_index=None, num_physical_experts=0,
                   map_policy=0):
    """weights float32 [T, k] and ids int32 [T, k]: the k largest sigmoid(input) + bias of the topk_group groups whose two
    largest add up to most; weights are the sigmoid, over their sum, times the factor, as asked.

    Scores are rounded to input's dtype. Ids of the rows from num_token_non_padded on are -1. Chosen experts come in no
    order. Source: MATE, mate/moe_fused_gate.py and csrc/moe_fused_gate.mu.
    """
    op = "moe_fused_gate"
    need_rank(op, "input", input, 2)
    need_rank(op, "bias", bias, 1)
    need_dtype(op, "input", input, torch.float32, torch.float16, torch.bfloat16)
    need_dtype(op, "bias", bias, input.dtype)
    rows, experts = input.shape
    need_shape(op, "bias", bias, [experts])
    need(experts % 32 == 0, op, "input.shape[1]", experts, "a multiple of 32")
    need(num_expert_group > 0 and experts % num_expert_group == 0, op, "num_expert_group", num_expert_group,
         f"a divisor of {experts}")
    need(topk_group > 0, op, "topk_group", topk_group, "1 or more")
    need(num_fused_shared_experts == 0, op, "num_fused_shared_experts", num_fused_shared_experts,
         "0 (this stand-in appends no shared experts)")
    need(0 < topk <= experts, op, "topk", topk, f"1 to {experts}")
    need(routed_scaling_factor != 0, op, "routed_scaling_factor", routed_scaling_factor, "a number other than 0")
    need(num_token_non_padded <= rows, op, "num_token_non_padded", num_token_non_padded, f"at most {rows}")
    need(map_policy == 0, op, "map_policy", map_policy, "0 (this stand-in maps no expert)")
    need_absent(op, "map_policy 0 reads no map", static_index_map=static_index_map, dynamic_index_map=dynamic_index_map,
                dynamic_index_map_valid=dynamic_index_map_valid, random_index=random_index)
    size = experts // num_expert_group
    if (experts, num_expert_group) not in _COMPILED:
        need(size <= 128, op, "experts in a group", size, f"128 at most, as {experts} experts in {num_expert_group} "
             "groups are not compiled in")
        need(num_expert_group in (1, 2, 4, 8, 16, 32), op, "num_expert_group", num_expert_group,
             f"a power of two up to 32, as {experts} experts in {num_expert_group} groups are not compiled in")

    score = torch.sigmoid(input.float()).to(input.dtype)
    choice = (score + bias).float().nan_to_num(-math.inf).view(rows, num_expert_group, size)
    best = choice.topk(min(2, size), -1).values.sum(-1)
    kept = highest(best, min(topk_group, num_expert_group))
    allowed = torch.zeros(rows, num_expert_group, dtype=torch.bool).scatter_(1, kept, True)
    need(topk <= size * kept.shape[1], op, "topk", topk, f"at most {size * kept.shape[1]} in {kept.shape[1]} groups")
    ids = highest(choice.masked_fill(~allowed[..., None], -math.inf).flatten(1), topk)
    weights = score.float().gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    if apply_routed_scaling_factor_on_output:
        weights = weights * routed_scaling_factor
    ids = ids.int()
    if num_token_non_padded > 0:
        ids[num_token_non_padded:] = -1
    return weights.contiguous(), ids.contiguous()
