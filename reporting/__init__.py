"""What a run tells: its log, the machine that it ran on, and how both are read again."""
