"""enwik8, one byte per token: writes train.bin, val.bin, test.bin (90M, 5M, 5M tokens) and meta.json here.

    python data/enwik8/prepare.py [--input=FILE] [--form=prose] [--vocab_size=N] [--out=DIR] [--processes=N]

Takes enwik8, enwik8.zip or enwik8.gz from --input or from this folder, else downloads 36 MB. --form=prose makes
data/enwik8_prose instead, as the prepare.py there does.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from commandline import ends

if __name__ == '__main__':
    ends.watch('prepare.py')

from data import prepare_enwik8

if __name__ == '__main__':
    prepare_enwik8.main('bytes')
