"""What a run needs around its loop: start-up, ranks, precision, schedules, evaluation, log, hardware, dry run."""
