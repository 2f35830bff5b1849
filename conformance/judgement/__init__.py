"""Whether what came back is what the contract says. Knows nothing of backends."""
