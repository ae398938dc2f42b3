"""Parts of a run around its loop: start-up, restart, ranks, precision, evaluation, dry run."""
