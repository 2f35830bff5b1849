"""Expert layers: the router, the way to the experts and back, and products grouped by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from porthal.backends.ascend.calls import FLOATS, NPU
from porthal.backends.ascend.rows import SOME
from porthal.hal import Weight, WeightSpec, at_most, between, limits
from porthal.hal.backend import Read

EXPERTS = "torch_npu.npu_moe_init_routing_v2+npu_grouped_matmul+npu_swiglu+npu_moe_token_unpermute"
PLACES, SOURCES = 0, 1  # row_idx_type: where each choice went, or which choice each sorted row is
ENDS, COUNTS = 0, 1  # of experts' rows; for group lists and in what the routing returns
INNER = at_most(65535)  # the last axis of a factor
GROUPS = at_most(1024)


class Experts:
    def prepare(self, spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        """Experts' matrices lie as [experts, in, out], of which the weight is a view [experts, out, in]."""
        weight: Weight = super().prepare(spec, read, into)  # type: ignore[misc]
        if into is not None or spec.quantised or spec.op not in ("grouped_gemm", "moe_experts"):
            return weight
        return Weight(spec, weight.native.transpose(1, 2).contiguous().transpose(1, 2))

    @limits(provider="torch_npu.npu_moe_gating_top_k", tie="any", T=SOME, E=between(3, 2048), n_group=1)
    def moe_route(
        self, logits: Tensor, bias: Tensor, *, k: int, scale: float, n_group: int = 1, topk_group: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Its default is a softmax; its sigmoid always divides by the sum. Weights come in the dtype of the logits.

        Not in several groups: by its page a NaN takes its whole group out of the choice.
        """
        weights, ids, _ = NPU.npu_moe_gating_top_k(
            x=logits,
            k=k,
            bias=bias,
            k_group=topk_group,
            group_count=n_group,
            renorm=0,
            norm_type=1,
            routed_scaling_factor=scale,
            eps=1e-20,
        )
        return ids, weights

    @limits(provider="torch_npu.npu_moe_init_routing_v2", dtypes={"x": FLOATS}, T=SOME, E=at_most(10238))
    def moe_permute(self, x: Tensor, ids: Tensor, *, E: int, first_expert: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        rows, source, counts, _ = routed(x, ids, E, first_expert, SOURCES, COUNTS)
        nobodys = torch.arange(len(source), device=x.device) >= counts.sum()  # undefined, as the op leaves them
        return rows.masked_fill_(nobodys[:, None], 0), counts.int(), source.masked_fill_(nobodys, -1)

    @limits(provider="torch_npu.npu_grouped_matmul", dtypes={"x": FLOATS}, M=SOME, E=GROUPS, K=INNER, N=INNER)
    def grouped_gemm(self, x: Tensor, w: Weight, counts: Tensor) -> Tensor:
        return _grouped(x.contiguous(), w, groups_of(counts.cumsum(0), len(x)))

    @limits(provider=EXPERTS, dtypes={"x": "bfloat16"}, T=SOME, E=GROUPS, H=INNER, I=at_most(32767))
    def moe_experts(
        self, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor, *, first_expert: int = 0
    ) -> Tensor:
        rows, places, ends, _ = routed(x, ids, w13.spec.shape[0], first_expert, PLACES, ENDS)
        M = len(rows)
        nobodys = torch.arange(M, device=x.device) >= ends[-1]
        groups = groups_of(ends, M)
        h = NPU.npu_swiglu(input=_grouped(rows, w13, groups), dim=-1)
        made = _grouped(h, w2, groups).masked_fill_(nobodys[:, None], 0)
        return combined(made, places % M, weights)  # -1, a choice that went nowhere: the last row, which then is nobody's


def routed(
    x: Tensor, ids: Tensor, E: int, first_expert: int, idx_type: int, num_type: int, quantised: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows by expert, their indices, the experts' rows, and the rows' scales where they are to be int8.

    The op takes no id -1: others' are given experts of their own, one before the local ones and one behind."""
    made: tuple[Tensor, Tensor, Tensor, Tensor] = NPU.npu_moe_init_routing_v2(
        x=x,
        expert_idx=(ids - (first_expert - 1)).clamp_(0, E + 1),
        active_num=-1,
        expert_num=E + 2,
        drop_pad_mode=0,
        expert_tokens_num_type=num_type,
        expert_tokens_num_flag=True,
        quant_mode=1 if quantised else -1,
        active_expert_range=[1, E + 1],  # never left out: then the counts would be of other experts
        row_idx_type=idx_type,
    )
    return made


def groups_of(ends: Tensor, rows: int) -> Tensor:
    """The last group has to end with the rows: it takes what is behind as well, whose results nobody reads."""
    ends[-1:].fill_(rows)
    return ends


def _grouped(x: Tensor, w: Weight, ends: Tensor) -> Tensor:
    [y] = NPU.npu_grouped_matmul(
        x=[x], weight=[w.native.transpose(1, 2)], group_list=ends, split_item=2, group_type=0, group_list_type=ENDS
    )
    made: Tensor = y
    return made


def combined(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The op takes weights in the dtype of the rows: they go in two parts, what that dtype holds of them and the rest."""
    high = weights.to(rows.dtype)
    parts = high, (weights - high).to(rows.dtype)
    y, rest = (NPU.npu_moe_token_unpermute(permuted_tokens=rows, sorted_indices=places, probs=part) for part in parts)
    return y.add_(rest)
