"""The feed-forward half of a block: dense, or routed experts beside a shared one."""

from __future__ import annotations

from typing import Any

from porthal.hal import Binding, Weight
from porthal.model.checkpoint import ALL, Loader, chosen
from porthal.model.config import Config
from porthal.model.layout import Layout
from porthal.model.tokens import float_array, ids_array


class DenseMlp:
    """down(silu(gate x) * up x); where each rank has a share of the width, summed over the ranks."""

    def __init__(self, ops: Binding, config: Config, load: Loader, prefix: str, layout: Layout | None = None) -> None:
        width, hidden = config.intermediate_size, config.hidden_size
        self.ops = ops
        share = layout.share(width) if layout and layout.tensor else ALL
        self.comm = layout.comm if layout and layout.tensor else None
        names = [prefix + "gate_proj.weight", prefix + "up_proj.weight"]
        self.gate_up = load.joined("linear.w", (2 * width, hidden), names, share)
        self.down = load.part("linear.w", prefix + "down_proj.weight", (hidden, width), columns=share)

    def __call__(self, x: Any, total: int) -> Any:
        y = self.ops.linear(self.ops.silu_mul(self.ops.linear(x, self.gate_up)), self.down)
        return self.ops.all_reduce(y, self.comm) if self.comm else y


class MoeMlp:
    """Routed experts and the shared one. The router's product is float32; its bias only affects the choice."""

    def __init__(self, ops: Binding, config: Config, load: Loader, prefix: str, layout: Layout | None = None) -> None:
        c = config
        n, hidden, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        shared = width * c.n_shared_experts
        self.ops, self.config, self.layout = ops, config, layout
        self.gate = load.weight("linear.w", prefix + "gate.weight", n, hidden)
        self.bias = load.array(prefix + "gate.e_score_correction_bias", n, dtype="float32")
        self.mine = layout.experts(n) if layout else range(n)
        self.places = layout.chosen(n, layout.comm.rank) if layout and layout.table else []  # of each expert
        op, linear = ("moe_experts", "linear.w") if layout else ("moe_layer", "")
        self.w13: Weight | None = None  # of a rank without experts
        self.w2: Weight | None = None
        if self.mine:
            self._read_experts(load, prefix, op, n, hidden, width)
        names13 = [prefix + "shared_experts.gate_proj.weight", prefix + "shared_experts.up_proj.weight"]
        self.shared13 = load.joined(linear or "moe_layer.shared13", (2 * shared, hidden), names13)
        self.shared2 = load.weight(linear or "moe_layer.shared2", prefix + "shared_experts.down_proj.weight", hidden, shared)
        self.ones: dict[int, Any] = {}

    def _read_experts(self, load: Loader, prefix: str, op: str, n: int, hidden: int, width: int) -> None:
        """The experts of this rank, and no others."""
        count = len(self.mine)
        shapes = {"w13": (2 * width, hidden), "w2": (hidden, width)}
        apart = any(f"{prefix}experts.{self.mine[0]}.{part}_proj.weight" in load.kept for part in ("gate", "up", "down"))
        if load.source.holds(prefix + "experts.gate_up_proj") and not apart:  # as transformers holds them, and may save them
            stored = {"w13": prefix + "experts.gate_up_proj", "w2": prefix + "experts.down_proj"}
            reads = {name: chosen(load.rows(stored[name], (n, *shapes[name])), self.mine) for name in shapes}
            made = {name: load.build(f"{op}.{name}", (count, *shapes[name]), read) for name, read in reads.items()}
        else:
            each = [f"{prefix}experts.{e}." for e in self.mine]
            stacks = {"w13": ("gate_proj.weight", "up_proj.weight"), "w2": ("down_proj.weight",)}
            names = {name: [tuple(e + part for part in parts) for e in each] for name, parts in stacks.items()}
            made = {name: load.stacked(f"{op}.{name}", (count, *shapes[name]), names[name]) for name in shapes}
        self.w13, self.w2 = made["w13"], made["w2"]

    def __call__(self, x: Any, total: int) -> Any:
        if not self.layout:
            return self.ops.moe_layer(x, self.w13, self.w2, *self._routed(x), self.shared13, self.shared2)
        if self.layout.data:
            return self._dispatched(x, total, self.layout)
        mine = self._dispatched(x[self.layout.share(x.shape[0])], total, self.layout)
        return self.ops.all_gather_v(mine, self.layout.comm, M=total)[0]

    def _routed(self, x: Any) -> tuple[Any, Any]:
        c = self.config
        ids, weights = self.ops.moe_route(
            self.ops.linear(x, self.gate, out="float32"),
            self.bias,
            k=c.num_experts_per_tok,
            scale=c.routed_scaling_factor,
            n_group=c.n_group,
            topk_group=c.topk_group,
        )
        return ids, weights

    def _dispatched(self, x: Any, total: int, layout: Layout) -> Any:
        """The results of these rows, whose experts are on other ranks; all ranks have `total` rows together."""
        c, ops = self.config, self.ops
        ids, weights = self._routed(x)
        if self.places:  # by the host, as the exchange asks it for the numbers of rows anyway
            ids = ops.from_numpy(ids_array(self.places)[ops.to_numpy(ids).astype(int)])
        E = layout.total(c.n_routed_experts)
        most = max(1, total * min(c.num_experts_per_tok, layout.most(c.n_routed_experts)))
        rows, expert = ops.ep_dispatch(x, ids, layout.comm, E=E, M=most)
        if self.mine:
            if most not in self.ones:
                self.ones = {most: ops.from_numpy(float_array([1.0] * most)).reshape(most, 1)}
            first = layout.places(c.n_routed_experts).start
            rows = ops.moe_experts(rows, self.w13, self.w2, expert, self.ones[most], first_expert=first)
        y = ops.ep_combine(rows, ids, weights, layout.comm, E=E)
        return ops.add(y, ops.linear(ops.silu_mul(ops.linear(x, self.shared13)), self.shared2))
