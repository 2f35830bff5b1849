"""The CPU kernels of vLLM in the build that it loads where there is no AVX-512."""

requires = ("vllm", "torch")
