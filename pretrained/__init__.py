"""Names, settings and tensors of foreign weights: GPT-2, Llama, GGUF, nanoGPT. Imports no model."""
