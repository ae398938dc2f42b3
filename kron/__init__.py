"""Sums of Kronecker products as linear maps (linear.py), and the nearest such sum to a matrix (van_loan.py)."""
