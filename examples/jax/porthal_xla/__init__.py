"""XLA, through JAX: read whenever porthal lists the backends, so nothing heavy is imported here."""

requires = ("jax",)
