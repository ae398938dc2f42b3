"""FineWeb in GPT-2 tokens: writes fineweb_val_000000.bin, fineweb_train_000001.bin and so on, and meta.json here.

    python data/fineweb/prepare.py [--tokens=1B] [--name=sample-10BT] [--input=FILE_OR_FOLDER] [--shard_tokens=100M]
                                   [--out=DIR] [--processes=N]

Streams from the Hugging Face hub (HuggingFaceFW/fineweb; needs the network), or reads local files of the same form. The
first shard is for validation, as in llm.c and modded-nanogpt; the rest of its last document is dropped. The sample
has about 10 billion tokens, 21 GB on disk. Safe to interrupt: the same command resumes.
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
        FOLDER, load, 'HuggingFaceFW/fineweb', ('sample-10BT', 'sample-100BT', 'sample-350BT'), size=10.3e9))
