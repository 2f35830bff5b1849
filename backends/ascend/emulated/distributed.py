"""Expert parallelism in one call each way. What its pages want is checked; there is no second rank here to talk to."""

import torch

from porthal.backends.ascend.emulated.products import HALVES
from porthal.backends.torch.emulation.stand_in import need, need_absent, need_dtype, need_one_of, need_rank, need_shape


def _need_ranks(op, x, expert_ids, group_ep, world, rank, experts, group_tp, tp_world, tp_rank, shard_type, shared,
                shared_ranks, global_bs, specials):
    """What both pages state for the products A3, without shared and special experts."""
    need(1 <= len(group_ep) < 128, op, "group_ep", repr(group_ep), "a name of 1 to 127 characters")
    need(2 <= world <= 768, op, "ep_world_size", world, "2 to 768")
    need(0 <= rank < world, op, "ep_rank_id", rank, f"0 to {world - 1}")
    need(1 <= experts <= 1024 and experts % world == 0, op, "moe_expert_num", experts, f"a multiple of {world} up to 1024")
    for name, value in (("tp_rank_id", tp_rank), ("expert_shard_type", shard_type), ("shared_expert_rank_num", shared_ranks)):
        need_one_of(op, name, value, 0)
    need_one_of(op, "group_tp", group_tp, "")
    need_one_of(op, "tp_world_size", tp_world, 0, 1)
    need_one_of(op, "shared_expert_num", shared, 0, 1)
    for name, value in specials.items():
        need_one_of(op, name, value, 0)
    need_rank(op, "expert_ids", expert_ids, 2)
    need_dtype(op, "expert_ids", expert_ids, torch.int32)
    rows, k = expert_ids.shape
    need(1 <= rows <= 512, op, "expert_ids.shape[0]", rows, "1 to 512")
    need(1 <= k <= min(16, experts), op, "expert_ids.shape[1]", k, f"1 to {min(16, experts)}")
    need(bool(((expert_ids >= 0) & (expert_ids < experts)).all()), op, "expert_ids",
         f"from {int(expert_ids.min())} to {int(expert_ids.max())}", f"0 to {experts - 1}")
    need(all(len(set(row)) == k for row in expert_ids.tolist()), op, "expert_ids", "an expert twice in a row", "distinct ones")
    need_rank(op, "x", x, 2)
    need_dtype(op, "x", x, *HALVES)
    need(1024 <= x.shape[1] <= 8192, op, "x.shape[1]", x.shape[1], "1024 to 8192")
    need(global_bs == 0 or (global_bs % world == 0 and global_bs >= rows * world), op, "global_bs", global_bs,
         f"0, or {world} times the most rows of a rank")


def _no_other_rank(op, world):
    raise RuntimeError(f"{op}: ep_world_size is {world}, and this stand-in has no other rank to talk to.")


def npu_moe_distribute_dispatch_v2(x, expert_ids, group_ep, ep_world_size, ep_rank_id, moe_expert_num, *, scales=None,
                                   x_active_mask=None, expert_scales=None, elastic_info=None, performance_info=None,
                                   group_tp="", tp_world_size=0, tp_rank_id=0, expert_shard_type=0, shared_expert_num=1,
                                   shared_expert_rank_num=0, quant_mode=0, global_bs=0, expert_token_nums_type=1, comm_alg="",
                                   zero_expert_num=0, copy_expert_num=0, const_expert_num=0, y_dtype=None, x_dtype=None,
                                   scales_dtype=None):
    """Each row to the ranks of its experts: always refused, last for want of ranks. Source: its page."""
    op = "npu_moe_distribute_dispatch_v2"
    need_absent(op, "not supported yet", elastic_info=elastic_info)
    need_absent(op, "not documented", y_dtype=y_dtype, x_dtype=x_dtype, scales_dtype=scales_dtype)
    need_one_of(op, "comm_alg", comm_alg, "", "fullmesh_v1")
    need_absent(op, "comm_alg hierarchy has it", expert_scales=expert_scales)
    need_one_of(op, "quant_mode", quant_mode, 0, 2)
    need_one_of(op, "expert_token_nums_type", expert_token_nums_type, 0, 1)
    specials = dict(zero_expert_num=zero_expert_num, copy_expert_num=copy_expert_num, const_expert_num=const_expert_num)
    _need_ranks(op, x, expert_ids, group_ep, ep_world_size, ep_rank_id, moe_expert_num, group_tp, tp_world_size, tp_rank_id,
                expert_shard_type, shared_expert_num, shared_expert_rank_num, global_bs, specials)
    need_shape(op, "x", x, [len(expert_ids), x.shape[1]])
    need(scales is None or quant_mode == 2, op, "scales", "given", "None without quantisation")
    _no_other_rank(op, ep_world_size)


def npu_moe_distribute_combine_v2(expand_x, expert_ids, assist_info_for_combine, ep_send_counts, expert_scales, group_ep,
                                  ep_world_size, ep_rank_id, moe_expert_num, *, tp_send_counts=None, x_active_mask=None,
                                  expand_scales=None, shared_expert_x=None, elastic_info=None, ori_x=None,
                                  const_expert_alpha_1=None, const_expert_alpha_2=None, const_expert_v=None,
                                  performance_info=None, group_tp="", tp_world_size=0, tp_rank_id=0, expert_shard_type=0,
                                  shared_expert_num=1, shared_expert_rank_num=0, global_bs=0, comm_quant_mode=0, comm_alg="",
                                  zero_expert_num=0, copy_expert_num=0, const_expert_num=0):
    """The experts' rows back to their ranks and summed: always refused, last for want of ranks. Source: its page."""
    op = "npu_moe_distribute_combine_v2"
    need_absent(op, "not supported yet", elastic_info=elastic_info, tp_send_counts=tp_send_counts)
    need_absent(op, "comm_alg hierarchy has it", expand_scales=expand_scales)
    need_absent(op, "this stand-in has no special experts", ori_x=ori_x, const_expert_alpha_1=const_expert_alpha_1,
                const_expert_alpha_2=const_expert_alpha_2, const_expert_v=const_expert_v, shared_expert_x=shared_expert_x)
    need_one_of(op, "comm_alg", comm_alg, "")
    need_one_of(op, "comm_quant_mode", comm_quant_mode, 0, 2)
    specials = dict(zero_expert_num=zero_expert_num, copy_expert_num=copy_expert_num, const_expert_num=const_expert_num)
    _need_ranks(op, expand_x, expert_ids, group_ep, ep_world_size, ep_rank_id, moe_expert_num, group_tp, tp_world_size,
                tp_rank_id, expert_shard_type, shared_expert_num, shared_expert_rank_num, global_bs, specials)
    need_dtype(op, "expert_scales", expert_scales, torch.float32)
    need_shape(op, "expert_scales", expert_scales, expert_ids.shape)
    for name, tensor, shape in (("assist_info_for_combine", assist_info_for_combine, [len(expand_x) * 128]),
                                ("ep_send_counts", ep_send_counts, [moe_expert_num])):
        need_dtype(op, name, tensor, torch.int32)
        need_shape(op, name, tensor, shape)
    _no_other_rank(op, ep_world_size)
