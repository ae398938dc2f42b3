"""The parts of sample.py: prompts and their tokens, the next token, stops, several texts at once, conversations."""
