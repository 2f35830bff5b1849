"""Kernels in the feature set of Triton 3.0, one file per operator, each with the function that launches it."""
