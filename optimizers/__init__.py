"""Optimizers by tag and Muon."""
