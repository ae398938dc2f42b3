"""OpenWebText in GPT-2 tokens: writes openwebtext_val_000000.bin, openwebtext_train_000001.bin and so on, and meta.json.

    python data/openwebtext/prepare.py [--tokens=1B] [--input=FILE_OR_FOLDER] [--val_documents=4007] [--out=DIR]
                                       [--shard_tokens=100M] [--processes=N]

Streams from the Hugging Face hub (Skylion007/openwebtext; needs the network), or reads local files of the same form. The
first 4,007 of 8,013,769 documents are for validation: nanoGPT's share of 0.05%, but not its draw, which needs all of
them at hand. About 9 billion tokens, 18 GB on disk. Safe to interrupt: the same command resumes.
"""
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from commandline import ends

if __name__ == '__main__':
    ends.watch('prepare.py')

from data import prepare_documents


def load(*arguments, **options):
    """load_dataset, imported where it is called: that takes seconds, and every process reads this file."""
    from datasets import load_dataset
    return load_dataset(*arguments, **options)


if __name__ == '__main__':
    prepare_documents.main(prepare_documents.Recipe(
        FOLDER, load, 'Skylion007/openwebtext', (), size=9.1e9, val_documents=4007))
