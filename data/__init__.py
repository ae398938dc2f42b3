"""Data sets: token files (shards.py, dataset.py), batches from them (loader.py), tokenizers, prepare scripts."""
