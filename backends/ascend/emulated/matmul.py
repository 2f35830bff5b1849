"""Products with weights: grouped by expert, of int8 numbers, and the formats that weights are held in."""

import warnings

import torch

from porthal.backends.ascend.emulated.products import FLOATS, Format, format_of
from porthal.backends.torch.emulation.stand_in import (
    garbage,
    lengths,
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_one_of,
    need_rank,
    need_shape,
)

INNER = 65536
_DTYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}  # c10::ScalarType


def npu_format_cast(input, acl_format, *, customize_dtype=None, input_dtype=None):
    """A copy in another storage format, ND (2) or FRACTAL_NZ (29), which get_npu_format tells. Source: its page.

    Without `torch.npu.config.allow_internal_format` it is ND whatever is asked, with a warning: torch-npu 2.13.0 over stubs.
    """
    op = "npu_format_cast"
    need_one_of(op, "acl_format", acl_format, *map(int, Format))
    need_absent(op, "this stand-in has the element sizes of the dtypes only", customize_dtype=customize_dtype,
                input_dtype=input_dtype)
    made = input.clone(memory_format=torch.contiguous_format)
    made.npu_format = Format(acl_format)
    if made.npu_format != Format.ND and not torch.npu.config.allow_internal_format:
        warnings.warn("Cannot create tensor with internal format while allow_internal_format=False", stacklevel=2)
        made.npu_format = Format.ND
    return made


def get_npu_format(input):
    """Source: npu_format_cast page."""
    return format_of(input)


def asked(op, name, dtype):
    need(dtype is None or dtype in _DTYPES, op, name, dtype, f"None or one of {list(map(str, _DTYPES.values()))}")
    return _DTYPES.get(dtype)


def groups_of(op, group_list, kind, count, rows):
    """First and last row of each group, as (weight, begin, end)."""
    need_dtype(op, "group_list", group_list, torch.int64)
    if kind == 2:
        need_shape(op, "group_list", group_list, [count, 2])
        pairs = group_list.tolist()
        need(all(0 <= e < count for e, n in pairs if n), op, "group_list", pairs, f"experts 0 to {count - 1}")
    else:
        need_shape(op, "group_list", group_list, [count])
        ends = lengths(op, "group_list", group_list, torch.int64)
        counts = [b - a for a, b in zip([0, *ends], ends)] if kind == 0 else ends
        pairs = list(enumerate(counts))
    need(all(n >= 0 for _, n in pairs), op, "group_list", group_list.tolist(),
         "sums that never fall" if kind == 0 else "counts that are not negative")
    need(sum(n for _, n in pairs) <= rows, op, "group_list", group_list.tolist(), f"{rows} rows at most in all")
    found, begin = [], 0
    for expert, n in pairs:
        found.append((expert, begin, begin + n))
        begin += n
    return found


def npu_grouped_matmul(x, weight, *, bias=None, scale=None, offset=None, antiquant_scale=None, antiquant_offset=None,
                       per_token_scale=None, group_list=None, activation_input=None, activation_quant_scale=None,
                       activation_quant_offset=None, split_item=0, group_type=None, group_list_type=0, act_type=0,
                       tuning_config=None, output_dtype=None, x_dtype=None, weight_dtype=None, scale_dtype=None,
                       per_token_scale_dtype=None):
    """y = x[rows of a group] @ weight[group] [K, N], int8 times scale[group] and per_token_scale; rows behind are undefined.

    One x and one weight of all groups, or one per group. Source: npu_grouped_matmul page; that rows may be left over:
    its example with int4; scale [E, N] beside one weight [E, K, N]: aclnnGroupedMatmulV5 page.
    """
    op = "npu_grouped_matmul"
    need_absent(op, "this stand-in has no bias and no weights of fewer bits than x", bias=bias, antiquant_scale=antiquant_scale,
                antiquant_offset=antiquant_offset, x_dtype=x_dtype, weight_dtype=weight_dtype, scale_dtype=scale_dtype,
                per_token_scale_dtype=per_token_scale_dtype)
    need_absent(op, "the product has none", offset=offset, activation_input=activation_input,
                activation_quant_scale=activation_quant_scale, activation_quant_offset=activation_quant_offset)
    need_one_of(op, "act_type", act_type, 0)
    need_one_of(op, "split_item", split_item, 0, 1, 2, 3)
    need(0 < len(weight) <= 128 and 0 < len(x) <= 128, op, "len(x), len(weight)", (len(x), len(weight)), "1 to 128")
    if group_type == -1:
        need_absent(op, "group_type -1 has a weight per x", group_list=group_list)
        need_absent(op, "this stand-in quantises with group_type 0 only", scale=scale, per_token_scale=per_token_scale)
        need_one_of(op, "split_item", split_item, 0, 1)
        need(len(x) == len(weight), op, "len(x), len(weight)", (len(x), len(weight)), "as many")
        return [_product(op, *pair, output_dtype) for pair in zip(x, weight)]
    need_one_of(op, "group_type", group_type, -1, 0)
    need_one_of(op, "split_item", split_item, 2, 3)
    need(isinstance(group_list, torch.Tensor), op, "group_list", group_list, "a tensor on the device")
    need_one_of(op, "group_list_type", group_list_type, 0, 1, 2)
    need(len(x) == 1, op, "len(x)", len(x), "1 for group_type 0")
    [rows] = x
    need_rank(op, "x[0]", rows, 2)
    need_dense(op, **{"x[0]": rows})
    if len(weight) == 1:
        need_rank(op, "weight[0]", weight[0], 3)
        per_group = list(weight[0])
        need(len(per_group) <= 1024, op, "group_list.shape[0]", len(per_group), "1024 groups at most")
    else:
        per_group = list(weight)
    need(group_list_type == 0 or len(per_group) > 1, op, "group_list.shape[0]", 1, "2 or more for counts")
    need(group_list_type != 2 or rows.dtype == torch.int8, op, "group_list_type", 2, "0 or 1 unless x is torch.int8")
    for one in per_group:
        need_rank(op, "weight", one, 2)
        need_dtype(op, "weight", one, rows.dtype)
        need_shape(op, "weight", one, [rows.shape[1], per_group[0].shape[1]])
        inner = max(rows.shape[1], one.shape[0 if one.stride(0) == 1 else 1])
        need(inner < INNER, op, "the last dimension in memory", inner, f"below {INNER}")
    width = per_group[0].shape[1]
    finish = _finish(op, rows, scale, per_token_scale, output_dtype, len(per_group), width)
    groups = groups_of(op, group_list, group_list_type, len(per_group), len(rows))
    parts = [finish(rows[a:b], per_group[e], e, slice(a, b)) for e, a, b in groups if b > a]
    dtype = parts[0].dtype if parts else finish(rows[:0], per_group[0], 0, slice(0, 0)).dtype
    y = garbage([len(rows), width], dtype)
    end = groups[-1][2] if groups else 0
    if parts:
        y[:end] = torch.cat(parts)
    return [y]


def _product(op, x, weight, output_dtype):
    need_dtype(op, "x", x, *FLOATS)
    need_dtype(op, "weight", weight, x.dtype)
    need(2 <= x.dim() <= 6, op, "x.dim()", x.dim(), "2 to 6")
    need_shape(op, "weight", weight, [x.shape[-1], weight.shape[-1]])
    need(asked(op, "output_dtype", output_dtype) in (None, x.dtype), op, "output_dtype", output_dtype, f"x's {x.dtype}")
    return (x.float() @ weight.float()).to(x.dtype)


def _finish(op, rows, scale, per_token_scale, output_dtype, count, width):
    """The function of (rows, weight, group, their place) that a group's product is."""
    if rows.dtype != torch.int8:
        need_dtype(op, "x[0]", rows, *FLOATS, torch.int8)
        need_absent(op, "x is not quantised", scale=scale, per_token_scale=per_token_scale)
        return lambda x, weight, group, place: _product(op, x, weight, output_dtype)
    need(scale is not None and len(scale) == 1, op, "len(scale)", None if scale is None else len(scale), "1 beside int8")
    [factor] = scale
    need_dtype(op, "scale[0]", factor, torch.bfloat16, torch.float32)
    need_shape(op, "scale[0]", factor, [count, width])
    made = torch.bfloat16 if factor.dtype == torch.bfloat16 else torch.float16
    need(asked(op, "output_dtype", output_dtype) == made, op, "output_dtype", output_dtype,
         f"{made} beside a scale of {factor.dtype}")
    each = torch.ones(len(rows))
    if per_token_scale is not None:
        need(len(per_token_scale) == 1, op, "len(per_token_scale)", len(per_token_scale), "1")
        [each] = per_token_scale
        need_dtype(op, "per_token_scale[0]", each, torch.float32)
        need_shape(op, "per_token_scale[0]", each, [len(rows)])
    return lambda x, weight, group, place: (
        exact(x, weight) * factor[group].float() * each[place, None]).to(made)


def exact(a, b):
    """The product of int8 numbers, as the chip accumulates it in int32, then in float32."""
    return (a.double() @ b.double()).float()


def npu_quant_matmul(x1, x2, scale, *, offset=None, pertoken_scale=None, bias=None, output_dtype=None, x1_dtype=None,
                     x2_dtype=None, pertoken_scale_dtype=None, scale_dtype=None, group_sizes=None, y_scale=None):
    """(x1 @ x2 + an int32 bias) * scale * pertoken_scale + another bias, of int8 numbers; without output_dtype to int8.

    Source: npu_quant_matmul page, table 2.
    """
    op = "npu_quant_matmul"
    need_absent(op, "this stand-in has int8 with scales per row and per column only", offset=offset, x1_dtype=x1_dtype,
                x2_dtype=x2_dtype, pertoken_scale_dtype=pertoken_scale_dtype, scale_dtype=scale_dtype, y_scale=y_scale,
                group_sizes=group_sizes)
    need_rank(op, "x1", x1, 2)
    need_dtype(op, "x1", x1, torch.int8)
    need_dtype(op, "x2", x2, torch.int8)
    need_shape(op, "x2", x2, [x1.shape[1], x2.shape[-1]])
    need(max(x1.shape[1], x2.shape[1]) < INNER, op, "the last dimension", max(x1.shape[1], x2.shape[1]), f"below {INNER}")
    need(min(x1.numel(), x2.numel()) > 0, op, "x1.shape, x2.shape", (list(x1.shape), list(x2.shape)), "no empty tensor")
    made = asked(op, "output_dtype", output_dtype) or torch.int8
    scales = {torch.int8: (torch.float32,), torch.float16: (torch.float32,), torch.bfloat16: (torch.float32, torch.bfloat16)}
    need_one_of(op, "output_dtype", made, *scales)
    need_dtype(op, "scale", scale, *scales[made])
    need_shape(op, "scale", scale, [1 if scale.shape == (1,) else x2.shape[1]])
    if pertoken_scale is not None:
        need(made != torch.int8, op, "pertoken_scale", "given", "None for int8 results")
        need_dtype(op, "pertoken_scale", pertoken_scale, torch.float32)
        need_shape(op, "pertoken_scale", pertoken_scale, [len(x1)])
    y = (x1.double() @ x2.double())
    if bias is not None:
        late = (torch.bfloat16, torch.float32) if made == torch.bfloat16 or pertoken_scale is not None else ()
        need_dtype(op, "bias", bias, torch.int32, *late)
        need_shape(op, "bias", bias, [x2.shape[1]])
        y = y + bias if bias.dtype == torch.int32 else y
    y = y.float() * scale.float()
    if pertoken_scale is not None:
        y = y * pertoken_scale[:, None]
    if bias is not None and bias.dtype != torch.int32:
        y = y + bias.float()
    return y.round().clamp(-128, 127).to(made) if made == torch.int8 else y.to(made)
