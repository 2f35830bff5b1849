"""The kernels of AMD's PACE."""

requires = ("pace", "torch")
