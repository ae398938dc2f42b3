"""Changes of a model during a run: blocks added or frozen, structures dropped in, guided, made dense; their reports."""
