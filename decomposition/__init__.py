"""Dense weights to structures: calibration, methods per site, layer by layer, budgets; models from sources."""
