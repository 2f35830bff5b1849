"""The feed-forward half of a block: dense, or routed experts beside a shared one."""

from __future__ import annotations

from typing import Any

from porthal.hal import Binding
from porthal.model.checkpoint import Loader
from porthal.model.config import Config


class DenseMlp:
    """down(silu(gate x) * up x)."""

    def __init__(self, ops: Binding, config: Config, load: Loader, prefix: str) -> None:
        width, hidden = config.intermediate_size, config.hidden_size
        self.ops = ops
        names = [prefix + "gate_proj.weight", prefix + "up_proj.weight"]
        self.gate_up = load.joined("linear.w", (2 * width, hidden), names)
        self.down = load.weight("linear.w", prefix + "down_proj.weight", hidden, width)

    def __call__(self, x: Any) -> Any:
        return self.ops.linear(self.ops.silu_mul(self.ops.linear(x, self.gate_up)), self.down)


class MoeMlp:
    """Routed experts and the shared one. The router's product is float32; its bias only affects the choice."""

    def __init__(self, ops: Binding, config: Config, load: Loader, prefix: str) -> None:
        c = config
        n, hidden, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        shared = width * c.n_shared_experts
        self.ops, self.config = ops, config
        self.gate = load.weight("linear.w", prefix + "gate.weight", n, hidden)
        self.bias = load.array(prefix + "gate.e_score_correction_bias", n, dtype="float32")
        if load.source.holds(prefix + "experts.gate_up_proj"):  # as transformers holds them, and may save them
            self.w13 = load.weight("moe_layer.w13", prefix + "experts.gate_up_proj", n, 2 * width, hidden)
            self.w2 = load.weight("moe_layer.w2", prefix + "experts.down_proj", n, hidden, width)
        else:
            each = [f"{prefix}experts.{e}." for e in range(n)]
            names = [(e + "gate_proj.weight", e + "up_proj.weight") for e in each]
            self.w13 = load.stacked("moe_layer.w13", (n, 2 * width, hidden), names)
            self.w2 = load.stacked("moe_layer.w2", (n, hidden, width), [(e + "down_proj.weight",) for e in each])
        names13 = [prefix + "shared_experts.gate_proj.weight", prefix + "shared_experts.up_proj.weight"]
        self.shared13 = load.joined("moe_layer.shared13", (2 * shared, hidden), names13)
        self.shared2 = load.weight("moe_layer.shared2", prefix + "shared_experts.down_proj.weight", hidden, shared)

    def __call__(self, x: Any) -> Any:
        c = self.config
        ids, weights = self.ops.moe_route(
            self.ops.linear(x, self.gate, out="float32"),
            self.bias,
            k=c.num_experts_per_tok,
            scale=c.routed_scaling_factor,
            n_group=c.n_group,
            topk_group=c.topk_group,
        )
        return self.ops.moe_layer(x, self.w13, self.w2, ids, weights, self.shared13, self.shared2)
