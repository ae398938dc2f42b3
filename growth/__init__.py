"""Changes of a model in the course of a run: blocks added, frozen, dropped in, guided, made dense; their reports."""
