"""Runs: one case checked, many in worker processes, further ones drawn."""
