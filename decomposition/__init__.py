"""Dense weights to structures: calibration, methods by site, layer by layer, budgets; models from sources."""
