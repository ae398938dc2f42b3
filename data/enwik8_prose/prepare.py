"""The articles of enwik8 without markup in GPT-2 tokens: writes train.bin, val.bin, test.bin and meta.json here.

    python data/enwik8_prose/prepare.py [--input=FILE] [--vocab_size=N] [--out=DIR] [--processes=N]

Takes enwik8 from --input or from data/enwik8, else downloads 36 MB. --vocab_size=N keeps the first N - 1 tokens of GPT-2
and <|endoftext|>, for small models, and writes data/enwik8_prose_N.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from commandline import ends

if __name__ == '__main__':
    ends.watch('prepare.py')

from data import prepare_enwik8

if __name__ == '__main__':
    prepare_enwik8.main('prose')
