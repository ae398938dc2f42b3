"""Shakespeare one character per token: writes train.bin, val.bin and meta.json here, from the text in shakespeare.xz.

    python data/shakespeare_char/prepare.py [--input=FILE] [--out=DIR]

Needs no network and about a second. The canonical tiny shakespeare, put here as input.txt, is used instead;
--input=FILE takes any UTF-8 text, whose characters become the vocabulary.
"""
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from commandline import ends

if __name__ == '__main__':
    ends.watch('prepare.py')

from data import prepare_text

if __name__ == '__main__':
    prepare_text.main(FOLDER, 'char')
