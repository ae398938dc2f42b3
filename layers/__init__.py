"""Shared by every variant: the dense linear, norms and tags, the base of structures, sums, losses."""
