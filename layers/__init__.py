"""What every variant stands on: the dense linear, norms and tags, the base of structures, sums, losses."""
