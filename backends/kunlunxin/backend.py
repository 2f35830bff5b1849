"""Kunlunxin's own kernels: kunlun_ops and xspeedgate_ops. All that is known of them is how vLLM-Kunlun 09869ee calls them.

Arguments go by place where they do there, results are written into arrays that are passed. Scores of the indexer take INT8
keys alone. The attention of prefill is not called: nobody published whether it stops at -1 or counts the keys of a request.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch_xmlir
from torch import Tensor

from porthal.backends.kunlunxin.calls import GATE, HALF, OPS, SORTED, UNITS, experts
from porthal.backends.kunlunxin.int8 import Int8
from porthal.backends.torch.backend import Torch
from porthal.backends.torch.interfaces.packed import Packed
from porthal.backends.torch.interfaces.slots import Joint, joint
from porthal.backends.torch.tables import StepPlan, angles, spliced
from porthal.backends.torch.vendor import Vendor
from porthal.hal import (
    Batch,
    Need,
    Pages,
    Place,
    Rows,
    Selection,
    SelectionSpec,
    Weight,
    any_of,
    at_least,
    dtype,
    limits,
    one_of,
    same_as,
)

NO_NAN = Need("no NaN, of which nobody published where it is ranked", lambda x: x == x)
EMULATED = "emulated" in getattr(torch_xmlir, "__version__", "")


class Kunlunxin(Int8, Joint, Vendor):
    """A P800. To PyTorch it is "cuda", with a name and a capability that are not its own."""

    kind, engine = "cuda", "nccl"  # the vendor's layer puts its own library in the place of NCCL
    package, visible = "torch_xmlir", "XPU_VISIBLE_DEVICES"
    captures = False  # its attention wants lengths on the host

    def __init__(self, device: str = "") -> None:
        if EMULATED:  # a CPU build of PyTorch has no "cuda" to give
            self._number(device)
            Torch.__init__(self, "cpu")
        else:
            super().__init__(device)

    def _count(self) -> int:
        count: int = torch_xmlir.xpu.device_count()
        return count

    @property
    def place(self) -> Place:
        return "emulated device" if EMULATED else "hardware"

    def describe(self) -> str:
        if EMULATED:
            return "emulated Kunlunxin, its modules on the CPU"
        found = torch_xmlir._XMLIRC._xpu_get_device_properties(torch.device(self.device).index)
        return f"Kunlunxin {found.name}"

    # -- row by row --------------------------------------------------------------------------------------------------

    @limits(provider="kunlun_ops.rmsnorm", dtypes={"weight": any_of(same_as("x"), one_of("float32"))})
    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
        y = self.empty(tuple(x.shape), dtype(x))
        OPS.rmsnorm(x.contiguous(), weight.contiguous(), y, eps)
        return y

    @limits(provider="kunlun_ops.add_rmsnorm", dtypes={"weight": any_of(same_as("x"), one_of("float32"))})
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        y, r = (self.empty(tuple(x.shape), dtype(x)) for _ in range(2))
        OPS.add_rmsnorm(
            x.contiguous(), residual.contiguous(), residual_output=r, weight=weight.contiguous(), eps=eps, output=y
        )
        return y, r

    @limits(provider="aten.layer_norm")
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
        """In float32, as vLLM's, which vLLM-Kunlun leaves as it is."""
        return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)

    @limits(provider="kunlun_ops.swiglu")
    def silu_mul(self, x: Tensor) -> Tensor:
        y = self.empty((x.shape[0], x.shape[1] // 2), dtype(x))
        OPS.swiglu(x=x.contiguous(), y=y)
        return y

    @limits(provider="kunlun_ops.rotary_embedding", T=at_least(1))
    def rope(self, x: Tensor, batch: Batch, *, theta: float, layout: str, start: int, width: int) -> Tensor:
        """In float32, so that no table of bfloat16 is made of the angles. A copy is turned in place, and a key of zeros."""
        place, table, key = batch.native.table(_turn, theta, width)
        part = x[..., start : start + width].to(torch.float32, copy=True).flatten(1).contiguous()
        OPS.rotary_embedding(
            positions=place,
            query=part,
            key=key,
            head_size=width,
            cos_sin_cache=table,
            is_neox=layout == "half",
        )
        return spliced(x, part.view(*x.shape[:2], width), start)

    # -- experts -----------------------------------------------------------------------------------------------------

    @limits(provider="kunlun_ops.moe_sigmoid_group_topk_norm", tie="any", n_group=1, needs={"logits": NO_NAN})
    def moe_route(
        self, logits: Tensor, bias: Tensor, *, k: int, scale: float, n_group: int = 1, topk_group: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Weights are computed once more: it divides by their sum, which may be 0. Equal groups would be in its own order."""
        T, E = logits.shape
        weights, ids = logits.new_zeros(T, k), logits.new_zeros(T, k, dtype=torch.int32)
        OPS.moe_sigmoid_group_topk_norm(
            x=logits.contiguous(),
            norm_score=weights,
            topk_index=ids,
            block_static=ids.new_zeros(UNITS, E),
            bias=bias.contiguous(),
            n_group=1,
            topk_group=1,
            scale=scale,
        )
        s = torch.sigmoid(logits).gather(1, ids.long())
        return ids, scale * s / (s.sum(-1, keepdim=True) + 1e-20)

    @limits(
        provider=f"{SORTED}.moe_fc+moe_post",
        dtypes={"x": HALF, "w13": same_as("x"), "w2": same_as("x")},
        T=at_least(1),
    )
    def moe_experts(
        self, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor, *, first_expert: int = 0
    ) -> Tensor:
        return experts(self, x, w13, w2, ids - first_expert, weights)

    # -- paged cache and sparse attention ----------------------------------------------------------------------------

    @limits(provider="kunlun_ops.concat_and_cache_mla+aten.index_put_", dtypes={"pages": HALF, "first": same_as("pages")})
    def kv_write(self, pages: Pages, batch: Batch, first: Tensor, second: Tensor | None = None) -> Pages:
        if second is None:  # a cache of keys, for which the vendor's op quantises
            return Packed.kv_write(self, pages, batch, first)
        plan = batch.native
        if (batch.slots >= 0).any():  # what it makes of slot -1 is not said: the first row that is written stands in for such
            first, second = (rows.index_select(0, plan.written) for rows in (first, second))
            OPS.concat_and_cache_mla(
                kv_c=first.contiguous(),
                k_pe=second.contiguous(),
                slot_mapping=plan.targets,
                kv_cache=joint(pages).unflatten(0, (pages.spec.n_blocks, pages.spec.block_size)),
            )
        return pages

    kv_write.capturable = False

    @limits(provider="kunlun_ops.fast_topkv2", tie="any", k=2048)
    def topk(self, scores: Tensor, batch: Batch, *, k: int) -> Selection:
        visible = batch.native.visible
        found, length = OPS.fast_topkv2(score=_ordered(scores), lengths=visible, topk=k), visible.clamp(max=k)
        valid = torch.arange(k, device=found.device) < length[:, None]
        return Selection(SelectionSpec(batch.T, k), Rows(torch.where(valid, found, -1), length))

    @limits(
        provider="kunlun_ops.fwd_kvcache_mla+xspeedgate_ops.convert_req_index_to_global_index",
        dtypes={"q_latent": "bfloat16", "q_rope": same_as("q_latent"), "kv": same_as("q_latent")},
        T=at_least(1),
        C=512,
        R=64,
    )
    def sparse_mla(
        self, q_latent: Tensor, q_rope: Tensor, kv: Pages, sel: Selection, batch: Batch, *, scale: float
    ) -> Tensor:
        """The attention for decoding, in which each row is a request of one: it reads as many entries as the length of a row
        says, which it wants on the host too. Keys are slots, so that the order of a request does not matter."""
        plan, rows = batch.native, self.rows(sel)
        slots = GATE.convert_req_index_to_global_index(
            req_id=plan.row_request,
            block_table=plan.block_table,
            token_indices=rows.indices.contiguous(),
            block_size=batch.block_size,
            num_topk_tokens=sel.spec.k,
        )
        T, heads, width = q_latent.shape
        out = q_latent.new_zeros(T, 1, heads, width)
        statistic = [torch.zeros(T, 1, heads, dtype=torch.float32, device=out.device) for _ in range(2)]
        host = torch.from_numpy(self.to_numpy(rows.length))
        OPS.fwd_kvcache_mla(
            q_c=torch.cat([q_latent, q_rope], dim=-1)[:, None],
            kv_cache=joint(kv),
            indices=slots[:, None],
            kv_lod_cpu=host,
            out=out,
            max_logits=statistic[0],
            p_sums=statistic[1],
            softmax_scale=scale,
            max_seq_kv=int(host.max()),
            kv_lod_xpu=rows.length,
        )
        return torch.where(rows.length[:, None, None] > 0, out[:, 0], 0)

    sparse_mla.capturable = False


def _ordered(scores: Tensor) -> Tensor:
    """Dense float32 without NaN, of which nobody published what the top-k makes."""
    return torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).contiguous()


def _turn(plan: StepPlan, theta: float, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [T], which row of the table is whose; cosines beside sines, float32 [T, width]; a key of zeros, which stays so."""
    angle = angles(plan.positions, theta, width)
    place = torch.arange(len(angle), device=angle.device)
    return place, torch.cat([angle.cos(), angle.sin()], dim=-1), angle.new_zeros(len(angle), width)
