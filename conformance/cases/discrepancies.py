"""Real mistakes of other projects' kernels and runtimes, and the cases that would have caught each of them.

Whoever ports a chip meets some of them again. A covered one names cases, which stand in every plan of their size, and has a
defect of the same kind in conformance/selftest/discrepancies.py, which these cases must find and all others let pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Literal

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.legal import FAR, PAST_2G, elements
from porthal.conformance.level import Level


@dataclass(frozen=True)
class Discrepancy:
    """One mistake, seen in public.

    what     what went wrong, in our words
    sources  where it was reported: "owner/repository#number", "a/b#1 (GLM-4.6)"
    cases    tokens of the cases that catch it; the first is the plainest
    family   patterns of other generated cases that contain the same trigger
    by       what covers it where cases do not: a test of the suite itself, or the wing that it waits for
    """

    number: int
    what: str
    sources: str
    status: Literal["covered", "suite", "open"] = "covered"
    cases: tuple[str, ...] = ()
    family: tuple[str, ...] = ()
    by: str = ""

    @property
    def op(self) -> str:
        """The op of the first case."""
        return _op(self.cases[0])

    @property
    def own(self) -> list[str]:
        """The cases of that op."""
        return [token for token in self.cases if _op(token) == self.op]

    def belongs(self, token: str) -> bool:
        """Whether a case contains this mistake's trigger."""
        return token in self.cases or any(fnmatchcase(token, pattern) for pattern in self.family)


COLLECTIVES = "collectives"

DISCREPANCIES = (
    Discrepancy(
        1,
        "A top-k by threshold kept every score equal to the k-th one and wrote more indices than it had room for.",
        "ggml-org/llama.cpp#17659",
        cases=(
            "topk,T=7,k=7,scores~ties,batch=mixed,block_size=64,0",
            "topk,T=7,k=7,scores~equal,batch=mixed,block_size=64,0",
        ),
        family=tuple(f"topk,*scores~{r}*" for r in ("ties", "equal", "special", "signed", "blocked", "shelves")),
    ),
    Discrepancy(
        2,
        "A row sort put its rows on a launch axis of 16 bits: everything above row 65,535 stayed unsorted.",
        "ggml-org/llama.cpp#16849",
        cases=(
            "topk,T=65536,k=1,batch=crowd,block_size=64,0",
            "topk,T=65537,k=1,batch=crowd,block_size=64,0",
        ),
        family=("topk,T=65536,*",),
    ),
    Discrepancy(
        3,
        "A segmented sort read one offset more than was written when the row count filled its last block exactly.",
        "ggml-org/llama.cpp#21181",
        cases=(
            "topk,T=256,k=7,batch=mixed,block_size=64,0",
            "topk,T=512,k=7,batch=mixed,block_size=64,0",
            "topk,T=1024,k=7,batch=mixed,block_size=64,0",
        ),
        family=("topk,T=256,*", "topk,T=65536,*"),
    ),
    Discrepancy(
        4,
        "A fused expert router weighed experts by the scores that select them, correction bias included.",
        "ggml-org/llama.cpp#18071, ggml-org/llama.cpp#18582 (GLM-4.6)",
        cases=("moe_route,T=7,E=160,k=8,scale=2.5,0",),
    ),
    Discrepancy(
        5,
        "A grouped top-k packed floats into sortable integers in an order that turns around below zero.",
        "sgl-project/sglang#23874",
        cases=("moe_route,T=7,E=64,k=8,scale=2.5,n_group=8,topk_group=4,bias~below,0",),
    ),
    Discrepancy(
        6,
        "A row of NaN made the router choose one expert k times, and the sort behind it crashed.",
        "vllm-project/vllm#39391, vllm-project/vllm#39593",
        cases=("moe_route,T=17,E=256,k=8,scale=2.5,logits~special,0",),
        family=("moe_route,*logits~special*",),
    ),
    Discrepancy(
        7,
        "A row of NaN gave an expert id one past the table, which the next kernel used as an address.",
        "sgl-project/sglang#30079",
        cases=("moe_route,T=17,E=256,k=8,scale=2.5,logits~special,0",),
        family=("moe_route,*logits~special*",),
    ),
    Discrepancy(
        8,
        "Dispatch left the places behind the last routed row as it found them: old expert ids were taken for real ones.",
        "sgl-project/sglang#24850",
        cases=("moe_permute,T=9,H=96,k=8,E=16,x:bf16,ids~holes,0",),
        family=tuple(f"moe_permute,*ids~{r}*" for r in ("crowded", "holes", "away", "wild", "eldest", "central")),
    ),
    Discrepancy(
        9,
        "An expert id of -1, which marks an unused place, was used as an index and changed rows of real tokens.",
        "vllm-project/vllm#57787, deepseek-ai/DeepGEMM#113",
        cases=("moe_experts,T=9,H=96,I=96,E=8,k=2,x:bf16,ids~holes,0",),
        family=tuple(f"moe_experts,*ids~{r}*" for r in ("crowded", "holes", "away", "eldest", "central")),
    ),
    Discrepancy(
        10,
        "NaN in a padding row reached the valid rows of its tile; a benchmark fell from 96 to 1 percent.",
        "flashinfer-ai/flashinfer#3650, pytorch/pytorch#154557",
        cases=("grouped_gemm,M=100,K=96,N=96,E=8,x:bf16,0",),
        family=("grouped_gemm,M=25?,*", "grouped_gemm,M=6553?,*"),
    ),
    Discrepancy(
        11,
        "Experts without a single row hung the grouped product, or failed as empty tensors.",
        "pytorch/torchtitan#1166, deepseek-ai/DeepEP#360",
        cases=(
            "grouped_gemm,M=33,K=96,N=96,E=8,x:bf16,counts~zeros,0",
            "grouped_gemm,M=33,K=96,N=96,E=8,x:bf16,counts~skewed,0",
        ),
        family=("grouped_gemm,*counts~zeros*",),
    ),
    Discrepancy(
        12,
        "A batch of exactly one token took a path of its own, which was wrong.",
        "deepseek-ai/DeepEP#356",
        cases=("moe_experts,T=1,H=128,I=128,E=8,k=8,x:bf16,0",),
        family=("moe_experts,T=1,*",),
    ),
    Discrepancy(
        13,
        "Kernels on one card synchronised only their first sixteen experts.",
        "vllm-project/vllm-ascend#6416",
        cases=(
            "moe_experts,T=7,H=96,I=96,E=32,k=8,x:bf16,0",
            "moe_experts,T=7,H=96,I=96,E=128,k=8,x:bf16,0",
        ),
        family=("moe_experts,*distinct=*",),
    ),
    Discrepancy(
        14,
        "An expert with more than 384 tokens was declared done before its later tokens were.",
        "vllm-project/vllm-ascend#5808",
        cases=("moe_experts,T=400,H=96,I=96,E=8,k=2,x:bf16,ids~crowded,0",),
        family=("moe_experts,T=6553*",),
    ),
    Discrepancy(
        15,
        "An on-chip buffer was addressed at a token count that its alignment does not permit.",
        "vllm-project/vllm-ascend#6707",
        cases=(
            "moe_permute,T=33,H=96,k=8,E=16,x:bf16,0",
            "moe_permute,T=39,H=96,k=8,E=16,x:bf16,0",
        ),
        family=("moe_permute,T=33,*",),
    ),
    Discrepancy(
        16,
        "Rows whose width is no multiple of 128 lost their end, or crashed.",
        "deepseek-ai/DeepEP#413, deepseek-ai/DeepGEMM#238",
        cases=(
            "moe_permute,T=3,H=576,k=8,E=16,x:bf16,0",
            "moe_permute,T=3,H=7176,k=8,E=16,x:bf16,0",
        ),
        family=("moe_permute,*distinct=*",),
    ),
    Discrepancy(
        17,
        "With fewer than sixteen heads the tile fell below what the matrix unit takes.",
        "flagos-ai/FlagGems#4447",
        cases=tuple(
            f"sparse_mla,T=5,N={n},C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch=mixed,block_size=64,0" for n in (1, 8, 12)
        ),
        family=("sparse_mla,*,N=1,*", "sparse_mla,*,N=8,*"),
    ),
    Discrepancy(
        18,
        "Head indices were split as if their number were a power of two. Groups of key heads, where it was seen, MLA has none.",
        "flagos-ai/FlagGems#3759",
        cases=(
            "sparse_mla,T=5,N=24,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch=mixed,block_size=64,0",
            "sparse_mla,T=5,N=12,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch=mixed,block_size=64,0",
        ),
    ),
    Discrepancy(
        19,
        "A head size that is no multiple of sixteen shifted what followed it.",
        "ggml-org/llama.cpp#20031",
        cases=tuple(
            f"rope,T=5,N=8,D={d},theta=1000000.0,layout=half,start=0,width={w},x:bf16,batch=mixed,block_size=64,0"
            for d, w in ((40, 40), (72, 64), (80, 64), (576, 64))
        ),
        family=("rope,*,D=17,*",),
    ),
    Discrepancy(
        20,
        "The address of an expert's weights overflowed 32 bits in a grouped product.",
        "deepspeedai/DeepSpeed#8261, deepseek-ai/DeepGEMM#226, vllm-project/vllm#34279, flagos-ai/FlagGems#6413",
        cases=("grouped_gemm,M=9,K=2048,N=2048,E=2,x:bf16,view=beyond,0",),
    ),
    Discrepancy(
        21,
        "Row times row stride overflowed 32 bits in a write by index: answers got worse, without an error.",
        "flagos-ai/FlagGems#6411, flagos-ai/FlagGems#4156",
        cases=(
            "kv_write,T=7,A=128,pages:bf16,-second,-b,batch=mixed,block_size=64,view=beyond,0",
            "take_rows,T=5,H=96,M=17,x:bf16,view=far,0",
            "embedding,T=3,V=65800,H=96,table:fp32,0",
            "argmax,T=3,V=154880,logits:bf16,0",
        ),
    ),
    Discrepancy(
        22,
        "Slots of a cache beyond two gigabytes were read from the wrong address.",
        "ROCm/aiter#4474, lightseekorg/tokenspeed#501, ggml-org/llama.cpp#24945, ggml-org/llama.cpp#23610",
        cases=(
            "sparse_mla,T=5,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch=mixed,block_size=64,view=beyond,0",
            "indexer_scores,T=5,G=8,D=128,scale=0.0156,iq:bf16,batch=mixed,block_size=64,view=beyond,0",
        ),
    ),
    Discrepancy(
        23,
        "A launch grid ends at 65,535: the rows, or the columns, beyond were not computed.",
        "vllm-project/vllm-ascend#10138, vllm-project/vllm-ascend#9780, ggml-org/llama.cpp#25103",
        cases=("rms_norm,T=65537,H=7,x:bf16,0", "rms_norm,T=2,H=65568,x:bf16,0", "linear,T=65536,K=7,N=7,x:bf16,0"),
        family=("rms_norm,T=65536,*",),
    ),
    Discrepancy(
        24,
        "A row that may look at nothing gave NaN where the softmax of nothing should give 0.",
        "iree-org/iree#24175, ggml-org/llama.cpp#16447",
        cases=("sparse_mla,T=9,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,sel~empty,batch=mixed,block_size=64,0",),
        family=tuple(f"sparse_mla,*{p}*" for p in ("sel~empty", "sel~short")),
    ),
    Discrepancy(
        25,
        "Scores below the finite number that stood for a masked place lost to it.",
        "flashinfer-ai/flashinfer#4401",
        cases=(
            "topk,T=7,k=7,scores~abyss,batch=mixed,block_size=64,0",
            "argmax,T=7,V=256,logits:bf16,logits~abyss,0",
            "log_softmax,T=7,V=256,logits:fp32,logits~abyss,0",
        ),
    ),
    Discrepancy(
        26,
        "Attention summed values in float16 before dividing, and a long context overflowed it.",
        "ggml-org/llama.cpp#17746, ggml-org/llama.cpp#17875, ggml-org/llama.cpp#18614",
        cases=(
            "sparse_mla,T=2,N=1,C=512,R=64,k=2048,scale=0.0625,q_latent:fp16,q_latent~zeros,q_rope~zeros,kv~offset,"
            "batch=deep,block_size=64,0",
        ),
    ),
    Discrepancy(
        27,
        "A kernel took a sliced or permuted input for a contiguous one.",
        "vllm-project/vllm-ascend#12025, vllm-project/vllm-ascend#11790, flagos-ai/FlagGems#3410, ggml-org/llama.cpp#19338",
        cases=(
            "rope,T=5,N=8,D=64,theta=1000000.0,layout=interleaved,start=0,width=64,x:bf16,batch=mixed,block_size=64,"
            "view=transposed,0",
        ),
        family=("rope,*view=*",),
    ),
    Discrepancy(
        28,
        "A weight expanded with stride 0 was read as if its elements followed one another.",
        "flagos-ai/FlagGems#2616",
        cases=("rms_norm,T=5,H=96,x:bf16,view=broadcast,0",),
        family=("rms_norm,*view=broadcast*",),
    ),
    Discrepancy(
        29,
        "A masked load left what lies behind the row in the tail of a block: zero times NaN is NaN.",
        "vllm-project/vllm-ascend#10276, flagos-ai/FlagGems#4631",
        cases=("rms_norm,T=7,H=100,x:bf16,view=columns,0",),
        family=("rms_norm,*,H=1,*", "rms_norm,*,H=7,*", "rms_norm,*distinct=*"),
    ),
    Discrepancy(
        30,
        "A padded buffer came uninitialised and its NaN entered a quantiser's block scale.",
        "vllm-project/vllm-ascend#9687",
        cases=tuple(f"quantize,T=3,K=96,scheme=fp8_group,x:{dtype},0" for dtype in ("bf16", "fp16", "fp32")),
        family=("quantize,*scheme=fp8_group*",),
    ),
    Discrepancy(
        31,
        "The indexer's rotary layout was taken for the attention's; it was mended and came back with a refactoring.",
        "vllm-project/vllm-ascend#7341, vllm-project/vllm-ascend#4641, vllm-project/vllm-ascend#5701, "
        "huggingface/transformers#42672",
        cases=(
            "rope,T=7,N=32,D=128,theta=1000000.0,layout=half,start=0,width=64,x:bf16,batch=mixed,block_size=64,0",
            "rope,T=7,N=32,D=128,theta=1000000.0,layout=interleaved,start=0,width=64,x:bf16,batch=mixed,block_size=64,0",
        ),
    ),
    Discrepancy(
        32,
        "Rotary tables were kept in bfloat16, which cannot tell late positions apart.",
        "vllm-project/vllm-ascend#9739",
        cases=(
            "rope,T=5,N=8,D=64,theta=1000000.0,layout=interleaved,start=0,width=64,x:bf16,batch=long,block_size=64,0",
        ),
        family=("rope,*batch=long*", "rope,*distinct=*"),
    ),
    Discrepancy(
        33,
        "The accumulator was rounded to the output's dtype first and scaled afterwards.",
        "flagos-ai/FlagGems#3295, vllm-project/vllm-ascend#7198",
        cases=(
            "sparse_mla,T=5,N=8,C=512,R=64,k=16,scale=0.3,q_latent:bf16,q_latent~large,batch=mixed,block_size=64,0",
        ),
    ),
    Discrepancy(
        34,
        "An intermediate sum of squares was stored in float16 and overflowed.",
        "flagos-ai/FlagGems#4237",
        cases=("rms_norm,T=16,H=96,x:bf16,x~large,0",),
        family=("rms_norm,*x~large*",),
    ),
    Discrepancy(
        35,
        "One dtype's path had another activation built in. It was the quantised one, which waits for low precision.",
        "vllm-project/vllm-ascend#11732",
        cases=("silu_mul,T=5,I=96,x:fp16,0",),
        family=("silu_mul,*x:fp16*",),
    ),
    Discrepancy(
        36,
        "An optional input left out silently switched off something else, too.",
        "vllm-project/vllm-ascend#9600",
        cases=(
            "speculative_verify@2,R=9,V=256,n=3,-draft_probs,0",
            "kv_write,T=9,A=128,pages:bf16,-second,-b,batch=mixed,block_size=64,0",
        ),
        family=("speculative_verify@2,*-draft_probs*",),
    ),
    Discrepancy(
        37,
        "A tiling made for large inputs cut a tiny one, x = [2, 192], into nothing.",
        "vllm-project/vllm-ascend#12123",
        cases=("silu_mul,T=2,I=96,x:bf16,0",),
        family=("silu_mul,T=2,I=96,*",),
    ),
    Discrepancy(
        38,
        "A captured graph replayed the lengths of the step it was captured at.",
        "vllm-project/vllm-ascend#10895, vllm-project/vllm-ascend#9818",
        cases=("indexer_topk,T=5,G=8,D=128,k=16,scale=0.0156,iq:bf16,batch=1/200+1/9+3/70,block_size=64,capture,0",),
        family=("indexer_topk,*,capture,*",),
    ),
    Discrepancy(
        39,
        "A padded request got a negative length. Seen under context parallelism, whose ranks wait for collectives.",
        "vllm-project/vllm-ascend#12840, vllm-project/vllm-ascend#13779",
        cases=("kv_write,T=7,A=128,B=64,pages:bf16,batch=2/9+3/0+2/70,block_size=64,0",),
    ),
    Discrepancy(
        40,
        "An addition in place went wrong inside a captured graph.",
        "vllm-project/vllm-ascend#6182",
        cases=("add,T=17,H=96,a:bf16,capture,0",),
        family=("add,*,capture,*",),
    ),
    Discrepancy(
        41,
        "Memory was freed on another stream, or read on the host before an asynchronous copy had ended.",
        "vllm-project/vllm-ascend#13394, vllm-project/vllm-ascend#11973, ggml-org/llama.cpp#26040, ggml-org/llama.cpp#24676",
        cases=("sample,T=17,V=4096,logits:bf16,0",),
        family=("sample,*",),  # behind every call memory is allocated and overwritten
    ),
    Discrepancy(
        42,
        "A race between the blocks of a fused expert kernel changed its result from run to run.",
        "ggml-org/llama.cpp#19790, ggml-org/llama.cpp#20084, deepseek-ai/DeepGEMM#285",
        cases=("moe_experts,T=300,H=96,I=96,E=8,k=8,x:fp32,0",),
        family=("moe_experts,T=6553*",),
    ),
    Discrepancy(
        43,
        "Threads that uploaded parts of one tensor disturbed each other.",
        "ggml-org/llama.cpp#20151",
        cases=("linear,T=7,K=96,N=256,x:bf16,view=threads,0",),
        family=("linear,*view=threads*",),
    ),
    Discrepancy(
        44,
        "With experts spread over cards their sum was reduced twice, or not at all.",
        "vllm-project/vllm-ascend#6710, vllm-project/vllm-ascend#9389, vllm-project/vllm-ascend#10557, "
        "vllm-project/vllm-ascend#971",
        "suite",
        by="tests/processes/test_planted.py::test_a_mistake_is_caught",
    ),
    Discrepancy(
        45,
        "A reduction over two mesh axes ran in another order than the gather it had to mirror.",
        "vllm-project/vllm-ascend#11921",
        "open",
        by=COLLECTIVES,
    ),
    Discrepancy(
        46,
        "An all-to-all with an empty part crashed or hung.",
        "horovod/horovod#2259, pytorch/pytorch#146468, pytorch/pytorch#85234, PaddlePaddle/Paddle#73875 (Metax)",
        "suite",
        by="tests/processes/test_planted.py::test_a_mistake_is_caught",
    ),
    Discrepancy(
        47,
        "An uneven all-to-all returned zeros on more than two ranks.",
        "candle-org/MindAct#2498 (CANN 8.3.RC2)",
        "suite",
        by="tests/processes/test_planted.py::test_a_mistake_is_caught",
    ),
    Discrepancy(
        48,
        "Split sizes were not checked, and a negative one wrapped around.",
        "pytorch/pytorch#101380, pytorch/pytorch#191511",
        "suite",
        by="tests/processes/test_references.py::test_a_wrong_call_is_the_same_sentence_on_every_rank",
    ),
    Discrepancy(
        49,
        "A reshape behind a sequence all-to-all mixed up queries, keys and values.",
        "deepspeedai/DeepSpeed#5664",
        "suite",
        by="tests/processes/test_planted.py::test_a_mistake_is_caught",
    ),
    Discrepancy(
        50,
        "An expert table was never filled, and its garbage was used as ids.",
        "vllm-project/vllm-ascend#9423",
        cases=("moe_experts,T=9,H=96,I=96,E=8,k=8,x:bf16,ids~wild,0",),
        family=("moe_experts,*ids~wild*",),
    ),
    Discrepancy(
        51,
        "The number of experts was used where the number of their places was meant, which is larger with copies.",
        "vllm-project/vllm-ascend#8501, vllm-project/vllm-ascend#8864",
        cases=("moe_permute,T=7,H=96,k=8,E=17,first_expert=3,x:bf16,ids~away,0",),
        family=("moe_permute,*ids~away*", "moe_permute,*ids~wild*"),
    ),
    Discrepancy(
        52,
        "A mode that promises results independent of the batch quietly ran another kernel.",
        "vllm-project/vllm#40628, vllm-project/vllm-ascend#11818",
        cases=("linear,T=23,K=512,N=96,x:fp32,0",),
    ),
    Discrepancy(
        53,
        "Expert weights were renormalised twice, which undid their scale.",
        "vllm-project/vllm-ascend#9692",
        cases=("moe_route,T=7,E=256,k=8,scale=2.5,n_group=8,topk_group=4,0",),
        family=("moe_route,*n_group=*",),
    ),
    Discrepancy(
        54,
        "Quantised weights of the multi-token head needed one more rotation than the others.",
        "vllm-project/vllm-ascend#7139 (GLM-5)",
        "suite",
        by="tests/plain/test_quantised.py::test_a_description_that_is_not_understood",  # what is rotated is refused
    ),
    Discrepancy(
        55,
        "A shipped backend's methods no longer had the signatures of their interface.",
        "deepspeedai/DeepSpeed#8208",
        "suite",
        by="tests/torch/test_discrepancies.py::test_kernels_have_the_signatures_of_their_contracts",
    ),
    Discrepancy(
        56,
        "A capability probe asked with made-up shapes and got the wrong answer for the real ones.",
        "ggml-org/llama.cpp#28513",
        "suite",
        by="tests/plain/test_conformance_runner.py::test_own_kernels_serve_what_they_claim_and_the_rest_is_inherited",
    ),
    Discrepancy(
        57,
        "A test suite reported success when nothing, or nothing but skips, had run.",
        "AMD-Ecosystem/flashinfer#297",
        "suite",
        by="tests/plain/test_conformance_runner.py::test_nothing_tested_is_no_success",
    ),
    Discrepancy(
        58,
        "A test runner waited for ever on a worker that had died.",
        "flagos-ai/FlagGems#5358",
        "suite",
        by="tests/plain/test_conformance_workers.py::test_a_case_that_takes_its_process_down_costs_that_case_alone",
    ),
    Discrepancy(
        59,
        "A top-k had room for 4,096 candidates of one bin; long rows of close scores have more there, which were lost.",
        "sgl-project/sglang#36807, vllm-project/vllm#52149 (GLM-5.2), flashinfer-ai/flashinfer#2605",
        cases=("topk,T=2,k=2048,scores~offset,batch=1/16384+1/20000,block_size=64,0",),
    ),
    Discrepancy(
        60,
        "A top-k guessed its threshold and kept the guess where fewer than k scores reached it.",
        "NVIDIA/TensorRT-LLM#17550, flashinfer-ai/flashinfer#4813",
        cases=("topk,T=2,k=2048,scores~comb,batch=1/8192+1/16384,block_size=64,0",),
    ),
    Discrepancy(
        61,
        "A router gave each of its 256 threads one expert: those above 255 were never chosen.",
        "kekzl/imp#2056",
        cases=(
            "moe_route,T=7,E=512,k=10,scale=2.5,0",
            "moe_route,T=7,E=384,k=8,scale=2.5,0",
            "moe_permute,T=7,H=96,k=8,E=384,x:bf16,0",
        ),
    ),
    Discrepancy(
        62,
        "Groups of one expert have no two best scores: to take two of one failed.",
        "vllm-project/vllm#29439, vllm-project/vllm#30422",
        cases=("moe_route,T=7,E=8,k=2,scale=2.5,n_group=8,topk_group=4,0",),
        family=("moe_route,*E=16,*n_group=16*",),
    ),
    Discrepancy(
        63,
        "A kernel that packs cache slots in pairs took pages of one slot for pages of two.",
        "sgl-project/sglang-jax#1074",
        cases=(
            "sparse_mla,T=5,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch=mixed,block_size=1,0",
            "indexer_scores,T=5,G=8,D=128,scale=0.0156,iq:bf16,batch=mixed,block_size=1,0",
            "kv_write,T=7,A=128,B=64,pages:bf16,batch=mixed,block_size=1,0",
        ),
        family=("sparse_mla,*block_size=1,*",),
    ),
    Discrepancy(
        64,
        "Rows to verify, several per request, ran on a decode kernel that was wrong for their number: "
        "once all got the result of the first.",
        "ROCm/aiter#2720, ROCm/aiter#5679, vllm-project/vllm#55239 (GLM-5.3-Flash)",
        cases=(
            "sparse_mla,T=6,N=1,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch=3/5+3/9,block_size=64,0",
            "sparse_mla,T=9,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch=3/41+3/70+3/9,block_size=64,0",
            "indexer_scores,T=9,G=8,D=128,scale=0.0156,iq:bf16,batch=3/41+3/70+3/9,block_size=64,0",
            "kv_write,T=9,A=128,B=64,pages:bf16,batch=3/41+3/70+3/9,block_size=64,0",
        ),
        family=("sparse_mla,T=3,*distinct=*",),
    ),
    Discrepancy(
        65,
        "A product with a single row loaded four numbers at once from weights whose rows are not aligned to four.",
        "ggml-org/llama.cpp#25671",
        cases=("linear,T=1,K=129,N=256,x:fp16,0",),
    ),
    Discrepancy(
        66,
        "Zeros that padded the vocabulary won where every logit was negative: the id was beyond the last.",
        "mirage-project/mirage#751",
        cases=("argmax,T=7,V=250,logits:bf16,logits~negative,0",),
        family=("argmax,T=6553*",),
    ),
    Discrepancy(
        67,
        "A draft of probability 0 was accepted where the random number was exactly 0.",
        "sgl-project/sglang#35771",
        cases=("speculative_verify@2,R=9,V=256,n=3,logits~masked,u~edges,0",),
        # As well where the draft's own probability is 0, which it is outside top_k, top_p and the argmax of a greedy row.
        family=tuple(f"speculative_verify@2,{p}*" for p in ("*logits~masked", "*u~", "*view=rows", "R=25?,")),
    ),
    Discrepancy(
        68,
        "At a very low temperature the logits overflowed to NaN, or their probabilities did not sum to 1.",
        "flashinfer-ai/flashinfer#5088, vllm-project/vllm#890, microsoft/aici#19",
        cases=(
            "sample,T=17,V=4096,logits:fp16,temperature~cold,0",
            "speculative_verify@2,R=9,V=256,n=3,temperature~cold,0",
        ),
        family=("sample,*logits:fp16,temperature~cold*",),
    ),
    Discrepancy(
        69,
        "Greedy rows were marked by the temperature -1, and masked logits divided by it: +inf, and NaN for the whole row.",
        "vllm-project/vllm#22180",
        cases=("sample,T=17,V=4096,logits:bf16,logits~masked,0",),
        family=("sample,*logits~masked*", "sample,*logits~special*", "sample,*logits~blocked*"),
    ),
    Discrepancy(
        70,
        "A top_p of 0 kept no candidate, and token 0 was drawn.",
        "google-deepmind/simply#42",
        cases=("sample,T=17,V=4096,logits:bf16,top_p~zeros,0",),
        family=("sample,*top_p~zeros*", "sample,*top_p~brink*"),
    ),
    Discrepancy(
        71,
        "A decode kernel read a cache's float32 scales as powers of two, cut off; its own tests had no other scales.",
        "vllm-project/vllm#49435, vllm-project/vllm#54563",
        cases=tuple(
            f"sparse_mla,T=7,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,{kv}kv%fp8_latents,batch=mixed,block_size=64,0"
            for kv in ("", "kv~uneven,")
        ),
        family=("sparse_mla,*kv%fp8_latents*",),
    ),
    Discrepancy(
        72,
        "The rows of a merged projection were divided by the block's: of 576 rows four of the five scales were loaded, and the "
        "last stayed as it was allocated.",
        "vllm-project/vllm-ascend#15346 (GLM-5.3)",
        cases=("moe_experts,T=7,H=96,I=96,E=8,k=8,x:fp32,w13%fp8_block,w2%fp8_block,0",),
        family=("moe_experts,*w13%fp8_block*",),
    ),
    Discrepancy(
        73,
        "Modules that a checkpoint leaves out of its quantisation were read as if they were quantised.",
        "lightseekorg/tokenspeed#527, sgl-project/sglang#39317 (GLM-5.3-Flash)",
        "suite",
        by="tests/plain/test_quantised.py::test_what_is_left_out_is_told_by_the_tensors",
    ),
    Discrepancy(
        74,
        "The path of experts in few bits had an activation of its own, another than that of the checkpoint.",
        "lightseekorg/tokenspeed#1647, sgl-project/sglang#34540, vllm-project/vllm#45859",
        cases=(
            "moe_experts,T=7,H=96,I=96,E=8,k=8,x:bf16,w13%nvfp4,w2%nvfp4,0",
            "moe_experts,T=7,H=96,I=96,E=8,k=8,x:fp32,w13%mxfp4,w2%mxfp4,0",
        ),
        family=("moe_experts,*w13%*",),
    ),
)


# -- in the plan -----------------------------------------------------------------------------------------------------


def _op(token: str) -> str:
    return token.partition(",")[0].partition("@")[0]


@cache
def of_op(op: str, capture: bool = False) -> tuple[Case, ...]:
    """The named cases of an op, each once: those that are captured, or the others."""
    tokens = dict.fromkeys(t for d in DISCREPANCIES for t in d.cases if _op(t) == op)
    return tuple(case for case in map(Case.from_token, tokens) if case.capture == capture)


def named(op: str, level: Level) -> Iterator[Case]:
    """The named cases of an op that are within a level's means."""
    for case in of_op(op):
        if elements(case) <= level.named_elements and (level.thorough or case.view not in (PAST_2G, FAR)):
            yield case


def named_for(token: str) -> list[Discrepancy]:
    """The discrepancies that a case was written for."""
    return [d for d in DISCREPANCIES if token in d.cases]
