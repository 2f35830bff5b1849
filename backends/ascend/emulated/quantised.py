"""Quantising to int8, alone and fused behind a product or an activation."""

import torch

from porthal.backends.ascend.emulated.matmul import INNER, asked, exact, groups_of
from porthal.backends.ascend.emulated.products import FLOATS, HALVES, need_nz, per_row_int8, swiglu
from porthal.backends.torch.emulation.stand_in import (
    garbage,
    need,
    need_absent,
    need_dtype,
    need_given,
    need_one_of,
    need_rank,
    need_shape,
)


def npu_dynamic_quant(input, *, smooth_scales=None, group_index=None, dst_type=None, quant_mode="pertoken", dst_type_max=0.0):
    """int8 numbers and a float32 scale per row, max |input * smooth_scales| / 127. Source: npu_dynamic_quant page."""
    op = "npu_dynamic_quant"
    need_dtype(op, "input", input, *HALVES)
    need(input.dim() > 1, op, "input.dim()", input.dim(), "2 or more")
    need_one_of(op, "quant_mode", quant_mode, "pertoken")
    need_one_of(op, "dst_type_max", dst_type_max, 0.0)
    need(asked(op, "dst_type", dst_type) in (None, torch.int8), op, "dst_type", dst_type, "torch.int8 or None")
    need_absent(op, "this stand-in has one row of smooth_scales", group_index=group_index)
    x = input.float()
    if smooth_scales is not None:
        need_dtype(op, "smooth_scales", smooth_scales, *HALVES)
        need_shape(op, "smooth_scales", smooth_scales, [input.shape[-1]])
        x = x * smooth_scales.float()
    return per_row_int8(x)


def npu_grouped_matmul_swiglu_quant_v2(x, weight, weight_scale, x_scale, group_list, *, smooth_scale=None,
                                       weight_assist_matrix=None, bias=None, dequant_mode=0, dequant_dtype=6, quant_mode=0,
                                       quant_dtype=1, group_list_type=0, tuning_config=None, x_dtype=None, weight_dtype=None,
                                       weight_scale_dtype=None, x_scale_dtype=None):
    """int8 and scales per row of silu(a) * b, where [a, b] = x[rows of a group] @ weight[group] * x_scale * weight_scale.

    Rows behind the groups are undefined. The page wants dequant_dtype and quant_dtype 0 of these products, which are not
    the schema's defaults. Source: npu_grouped_matmul_swiglu_quant_v2 page, A8W8.
    """
    op = "npu_grouped_matmul_swiglu_quant_v2"
    need_absent(op, "A8W8 has none", smooth_scale=smooth_scale, weight_assist_matrix=weight_assist_matrix, bias=bias,
                x_dtype=x_dtype, weight_dtype=weight_dtype, weight_scale_dtype=weight_scale_dtype, x_scale_dtype=x_scale_dtype)
    for name, value in (("dequant_mode", dequant_mode), ("dequant_dtype", dequant_dtype), ("quant_mode", quant_mode),
                        ("quant_dtype", quant_dtype)):
        need_one_of(op, name, value, 0)
    need_one_of(op, "group_list_type", group_list_type, 0, 1)
    need(len(weight) == len(weight_scale) == 1, op, "len(weight)", len(weight), "1, and of weight_scale 1")
    [weights], [scales] = weight, weight_scale
    need_rank(op, "x", x, 2)
    need_dtype(op, "x", x, torch.int8)
    need_rank(op, "weight[0]", weights, 3)
    need_dtype(op, "weight[0]", weights, torch.int8)
    need_nz(op, "weight[0]", weights)
    count, depth, width = weights.shape
    need(1 <= count <= 1024, op, "weight[0].shape[0]", count, "1 to 1024 groups")
    need(width % 2 == 0 and width <= 10240, op, "weight[0].shape[2]", width, "an even number up to 10240")
    need(x.shape[1] == depth < INNER, op, "x.shape[1]", x.shape[1], f"weight[0]'s {depth}, below {INNER}")
    need_dtype(op, "weight_scale[0]", scales, *FLOATS)
    need_shape(op, "weight_scale[0]", scales, [count, width])
    need_dtype(op, "x_scale", x_scale, torch.float32)
    need_shape(op, "x_scale", x_scale, [len(x)])
    q, row_scale = garbage([len(x), width // 2], torch.int8), garbage([len(x)], torch.float32)
    for e, a, b in groups_of(op, group_list, group_list_type, count, len(x)):
        c = exact(x[a:b], weights[e]) * x_scale[a:b, None] * scales[e].float()
        q[a:b], row_scale[a:b] = per_row_int8(swiglu(*c.chunk(2, -1)))
    return q, row_scale


def npu_dequant_swiglu_quant(x, *, weight_scale=None, activation_scale=None, bias=None, quant_scale=None, quant_offset=None,
                             group_index=None, activate_left=False, quant_mode=0, dst_type=None, round_mode=None,
                             activate_dim=None, swiglu_mode=0, clamp_limit=7.0, glu_alpha=1.702, glu_bias=1.0):
    """int8 and scales per row of silu(b) * a * quant_scale, where [a, b] = x * weight_scale * activation_scale.

    activate_left makes it silu(a) * b. Rows behind the groups are undefined. Source: npu_dequant_swiglu_quant page, its
    dynamic quantisation.
    """
    op = "npu_dequant_swiglu_quant"
    need_absent(op, "this stand-in has dynamic quantisation to int8 only", bias=bias, quant_offset=quant_offset,
                dst_type=dst_type, round_mode=round_mode, activate_dim=activate_dim)
    need_one_of(op, "quant_mode", quant_mode, 1)
    need_one_of(op, "swiglu_mode", swiglu_mode, 0)
    need_dtype(op, "x", x, torch.int32, *HALVES)
    need_rank(op, "x", x, 2)
    rows, width = x.shape
    need(width > 0 and width % 2 == 0, op, "x.shape[1]", width, "an even number")
    count = 1
    if group_index is not None:
        need_dtype(op, "group_index", group_index, torch.int64)
        need_rank(op, "group_index", group_index, 1)
        count = len(group_index)
        need(width // 2 <= 10496 and width // 2 % 64 == 0, op, "x.shape[1] / 2", width // 2, "a multiple of 64 up to 10496")
    if x.dtype == torch.int32:
        need_given(op, activation_scale=activation_scale)
        need_dtype(op, "activation_scale", activation_scale, torch.float32)
        need_shape(op, "activation_scale", activation_scale, [rows, 1])
    else:
        need_absent(op, "x is not int32", activation_scale=activation_scale)
    if weight_scale is not None:
        need_dtype(op, "weight_scale", weight_scale, torch.float32)
        need_shape(op, "weight_scale", weight_scale, [count, width])
    if quant_scale is not None:
        need_dtype(op, "quant_scale", quant_scale, *FLOATS)
        need_shape(op, "quant_scale", quant_scale, [count, width // 2])
    groups = [(0, 0, rows)] if group_index is None else groups_of(op, group_index, 1, count, rows)
    q, scale = garbage([rows, width // 2], torch.int8), garbage([rows], torch.float32)
    for g, a, b in groups:
        y = x[a:b].float()
        y = y if weight_scale is None else y * weight_scale[g]
        y = y if activation_scale is None else y * activation_scale[a:b]
        left, right = y.chunk(2, -1)
        y = swiglu(left, right) if activate_left else swiglu(right, left)
        q[a:b], scale[a:b] = per_row_int8(y if quant_scale is None else y * quant_scale[g].float())
    return q, scale
