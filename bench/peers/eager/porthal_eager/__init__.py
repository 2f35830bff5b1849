"""PyTorch's own fused operators on the CPU, as people call them in eager mode."""

requires = ("torch",)
