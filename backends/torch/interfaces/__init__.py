"""Kernels by the interface that a library offers, not by the chip: one mixin serves every chip whose vendor ships it."""
