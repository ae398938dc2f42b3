"""The parts of compress.py: the study and its trials, sizes for a budget, shared calibration, one trial, its report."""
