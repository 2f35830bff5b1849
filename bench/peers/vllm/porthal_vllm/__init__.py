"""The CPU kernels of vLLM, and those of SGLang that its wheel holds, in the build for AVX-512 with bfloat16."""

requires = ("vllm", "torch")
