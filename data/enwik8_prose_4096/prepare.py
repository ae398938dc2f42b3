"""The articles of enwik8 without markup in the first 4,095 tokens of GPT-2 and <|endoftext|>, for small models.

    python data/enwik8_prose_4096/prepare.py [--input=FILE] [--out=DIR] [--processes=N]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from commandline import ends

if __name__ == '__main__':
    ends.watch('prepare.py')

from data import prepare_enwik8

if __name__ == '__main__':
    prepare_enwik8.main('prose', 4096)
