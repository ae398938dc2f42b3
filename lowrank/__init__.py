"""Low-rank linear maps (linear.py), and the nearest low-rank product to a matrix (svd.py)."""
