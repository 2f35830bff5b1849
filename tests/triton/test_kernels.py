"""Own kernels in Triton's interpreter, an emulated device: each operator on a few calls that meet every branch."""

from __future__ import annotations

import pytest

from porthal.conformance.runner.runs import replay
from porthal.hal import NotClaimed, Unavailable, bind, create

CALLS = (
    "rms_norm,T=3,H=96,x:fp16,0",
    "rms_norm,T=2,H=8193,x:fp32,weight:fp32,x~outlier,0",
    "add_rms_norm,T=3,H=7,x:fp32,x~cancel,0",
    "silu_mul,T=2,I=2049,x:fp16,x~huge,0",
    "rope,T=5,N=3,D=72,theta=1000000.0,layout=half,start=3,width=64,x:fp32,batch=long,block_size=64,0",
    "rope,T=5,N=8,D=64,theta=10000.0,layout=interleaved,start=0,width=8,x:fp16,batch=mixed,block_size=64,0",
    "kv_write,T=7,A=512,B=64,pages:bf16,first~special,batch=padded,block_size=64,0",
    "kv_write,T=9,A=128,pages:bf16,-second,-b,batch=mixed,block_size=64,0",
    "moe_route,T=7,E=256,k=8,scale=2.5,logits~ties,0",
    "moe_route,T=7,E=16,k=4,scale=2.5,n_group=8,topk_group=4,logits~special,0",
    "moe_permute,T=40,H=96,k=2,E=16,first_expert=3,x:fp16,ids~holes,0",
    "moe_unpermute,T=7,H=96,k=8,sorted:fp32,0",
    "grouped_gemm,M=64,N=96,K=96,E=33,x:fp16,counts~waist,0",
    "grouped_gemm,M=7,N=7,K=7,E=8,x:fp32,0",
    "moe_experts,T=5,H=96,I=131,E=17,k=2,first_expert=3,x:fp32,ids~away,0",
    "indexer_scores,T=7,G=40,D=128,scale=0.125,iq:fp16,w~negative,batch=mixed,block_size=64,0",
    "topk,T=5,k=16,scores~ties,batch=mixed,block_size=64,0",
    "topk,T=2,k=128,scores~special,batch=1/4099+1/9,block_size=64,0",
    "indexer_topk,T=7,G=8,D=128,k=16,scale=0.015625,iq:fp32,batch=mixed,block_size=64,0",
    "sparse_mla,T=5,N=20,C=512,R=64,k=128,scale=0.0625,q_latent:fp16,batch=mixed,block_size=64,0",
    "sparse_mla,T=1,N=3,C=24,R=24,k=300,scale=0.25,q_latent:fp32,sel~short,batch=1/4099,block_size=64,0",
    "sample,T=7,V=4096,logits:fp32,logits~ties,0",
    "sample,T=7,V=257,logits:fp16,logits~special,top_k~brim,0",
    "argmax,T=3,V=20000,logits:fp16,logits~ties,0",
)


@pytest.mark.parametrize("token", CALLS)
def test_an_own_kernel_passes(cuda, token):
    result = replay(token, cuda, isolate=False)
    assert (result.verdict, result.status) == ("PASS", "own"), result.explain()


def test_what_the_interpreter_cannot_do_is_not_claimed(cuda):
    bfloat16 = replay("rms_norm,T=3,H=96,x:bf16,0", cuda, isolate=False)
    many = replay("rms_norm,T=101,H=96,x:fp32,0", cuda, isolate=False)
    assert (bfloat16.status, many.status) == ("inherited", "inherited")
    with pytest.raises(NotClaimed, match="no graphs"):
        bind("cuda").capture(lambda: None)


def test_an_emulated_device_has_no_number(cuda):
    with pytest.raises(Unavailable, match="expected 'cuda', not '1'"):
        create("cuda:1")
    assert (str(cuda), cuda.place) == ("cuda", "emulated device")
