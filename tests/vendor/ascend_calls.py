"""What Ascend's adapter asks of torch_npu, and what comes back: printed as JSON by
`python tests/vendor/ascend_calls.py emulated|vendor`.

Shapes and dtypes per contract and per op of torch_npu, which on the vendor's package come from its own C++, and what it says to
calls that are wrong. No value is read, since on the stubs kernels compute nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOKENS = (
    "rms_norm,T=7,H=96,x:bf16,0",
    "rms_norm,T=7,H=96,x:bf16,weight:fp32,0",
    "add_rms_norm,T=7,H=96,x:bf16,0",
    "silu_mul,T=7,I=96,x:bf16,0",
    "rope,T=5,N=8,D=72,theta=1000000.0,layout=half,start=0,width=64,x:bf16,batch=mixed,block_size=64,0",
    "rope,T=5,N=8,D=64,theta=10000.0,layout=interleaved,start=0,width=64,x:fp32,batch=mixed,block_size=64,0",
    "kv_write,T=9,A=128,B=64,pages:bf16,batch=3/41+3/70+3/9,block_size=64,0",
    "moe_route,T=3,E=16,k=16,scale=64.0,0",
    "moe_permute,T=7,H=96,k=8,E=16,x:bf16,0",
    "grouped_gemm,M=33,K=96,N=96,E=8,x:bf16,0",
    "moe_experts,T=5,H=128,I=64,E=8,k=2,first_expert=2,x:bf16,0",
    "indexer_topk,T=7,G=8,D=128,k=16,scale=0.015625,iq:bf16,batch=mixed,block_size=64,0",
    "sparse_mla,T=7,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch=mixed,block_size=64,0",
    "mla_prolog,T=7,H=1024,Q=1536,N=2,D=128,C=512,R=64,theta=10000.0,eps=1e-05,h:bf16,batch=1/5+4/130+2/0,block_size=64,0",
    "quantize,T=7,K=96,scheme=int8_token,x:bf16,0",
    "linear,T=7,K=96,N=256,x:bf16,w%int8_channel,0",
    "linear,T=7,K=96,N=256,x:fp16,w%int8_channel,0",
    "head_linear,T=7,N=8,K=192,M=256,x:bf16,w%int8_channel,0",
    "grouped_gemm,M=33,K=96,N=96,E=8,x:bf16,w%int8_channel,0",
    "grouped_gemm,M=33,K=96,N=96,E=8,x:fp16,w%int8_channel,0",
    "moe_experts,T=5,H=128,I=64,E=8,k=2,first_expert=2,x:bf16,w13%int8_channel,w2%int8_channel,0",
    "kv_write,T=9,A=512,B=64,pages:bf16,pages%int8_tile_latents,batch=3/41+3/70+3/9,block_size=64,0",
    "kv_write,T=9,A=128,B=64,pages:bf16,pages%int8_half_keys,batch=3/41+3/70+3/9,block_size=64,0",
    "indexer_topk,T=7,G=8,D=128,k=16,scale=0.015625,iq:bf16,keys%int8_half_keys,batch=mixed,block_size=64,0",
    "sparse_mla,T=7,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,kv%int8_tile_latents,batch=mixed,block_size=64,0",
)


def main(where: str) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    if where == "emulated":
        from porthal.backends.ascend import emulated

        emulated.install()
    else:
        from tests.vendor import ascend_stub

        ascend_stub.load()

    import torch
    import torch_npu

    from porthal.backends.ascend.calls import NPU
    from porthal.conformance.cases.case import Case
    from porthal.conformance.cases.copies import build
    from porthal.hal import bind, create

    backend, seen = create("ascend"), []

    def noted(name: str) -> Any:
        call = getattr(NPU, name)

        def run(**given: Any) -> Any:
            made = call(**given)
            seen.append([name, list(forms(made))])
            return made

        return run

    vars(NPU).update({name: noted(name) for name in NPU.calls})
    contracts, formats = {}, {}
    for token in TOKENS:
        seen.clear()
        inputs = build(Case.from_token(token))
        op = inputs.contract.name
        ops = bind(backend=backend, profile={op: [inputs.spec]}, overrides={}, fallback="error", check=False)
        placed = {name: _placed(ops, value) for name, value in inputs.operands.items()}
        made = getattr(ops, op)(*placed.values(), **inputs.attrs)
        contracts[token] = {"own": ops.choices[op].status == "own", "results": list(forms(made)), "calls": list(seen)}
        for name in placed.keys() & {"q_a", "w_uk", "w13"}:
            native = placed[name].native
            held = native.get("tiles") if isinstance(native, dict) else native
            formats[f"{name} of {op}, {placed[name].scheme}"] = str(torch_npu.get_npu_format(held))
    return {
        "place": backend.place,
        "schemas": [text for s in torch._C._jit_get_all_schemas() if (text := str(s)).startswith("npu::")],
        "contracts": contracts,
        "formats": formats,
        "errors": dict(errors()),
    }


def _placed(ops: Any, value: Any) -> Any:
    from porthal.hal import Operand

    return value.place(ops) if isinstance(value, Operand) else value if value is None else ops.from_numpy(value)


def forms(made: Any) -> Iterator[Any]:
    """Shape and dtype of each tensor, in order."""
    import torch

    if isinstance(made, torch.Tensor):
        yield [list(made.shape), str(made.dtype)]
    elif isinstance(made, (tuple, list)):
        for part in made:
            yield from forms(part)


def errors() -> Iterator[tuple[str, str]]:
    """What wrong calls raise: the dispatcher's text, without where in the C++ it was raised."""
    import torch

    npu = torch.ops.npu
    x, w = (torch.zeros(n, device="npu", dtype=torch.bfloat16) for n in ((4, 8), (8,)))
    wrong = {
        "another release's keyword": lambda: npu.npu_rms_norm(input=x, gamma=w, eps=1e-5),
        "a missing argument": lambda: npu.npu_rms_norm(input=x),
        "a number for a tensor": lambda: npu.npu_swiglu(input="x", dim=-1),
        "one argument too many": lambda: npu.npu_swiglu(x, -1, 0),
        "a keyword by its place": lambda: npu.npu_moe_gating_top_k(x, 2, w),
        "a tensor on the host": lambda: npu.npu_rms_norm(input=x.cpu(), gamma=w.cpu()),
    }
    for name, call in wrong.items():
        try:
            call()
        except Exception as error:
            yield name, f"{type(error).__name__}: {str(error).strip().splitlines()[0].partition('. ')[0]}"
        else:
            yield name, "no error"


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
