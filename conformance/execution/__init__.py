"""Calling it: operands placed on a backend, the kernel run and watched. Knows nothing of right and wrong."""
