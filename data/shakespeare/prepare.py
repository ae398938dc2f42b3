"""Shakespeare in GPT-2 tokens: writes train.bin, val.bin and meta.json here.

    python data/shakespeare/prepare.py [--input=FILE] [--out=DIR]

Needs no network: text and merges are in the repository. The canonical tiny shakespeare, put here as input.txt, is used
instead (301,966 + 36,059 tokens, as in nanoGPT); --input=FILE takes any UTF-8 text.
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
    prepare_text.main(FOLDER, 'gpt2')
