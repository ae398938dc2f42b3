"""What export.py writes beside the weights: one file with the model's code, a card, the tokenizer; and GGUF."""
