"""The parts of evaluate.py: texts, windows and their conventions, baselines, choices, pairs, lm-evaluation-harness."""
