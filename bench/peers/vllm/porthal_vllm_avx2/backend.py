"""vLLM's kernels in its build for AVX2, which newer processors run as well."""

from porthal_peer import Packed
from porthal_vllm.kernels import Vec, Vllm, load

load("_C_AVX2")


class VllmAvx2(Vllm, Vec, Packed):
    pass
