"""The parts of ablate.py: grids and their axes, what runs cost, the queue, rank search, effects, tables, plots, the page."""
