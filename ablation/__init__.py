"""The parts of ablate.py: grids and their axes, cost of runs, the queue, rank search, effects, tables, plots, the page."""
