"""AMD's zentorch: ZenDNN's kernels as operators of PyTorch."""

requires = ("zentorch", "torch")
