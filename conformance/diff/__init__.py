"""A model in lockstep with the reference, to find the first op and layer at fault."""
