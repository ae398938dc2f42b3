"""The output of a run: its log, its machine, and how to read both."""
