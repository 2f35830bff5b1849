"""Independent oracles for the GLM-5 model: tiny checkpoints, transformers' answers, and a float64 transcript."""
