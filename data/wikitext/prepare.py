"""wikitext-103 (or wikitext-2), raw, in GPT-2 tokens: writes shards of train, val and test, and meta.json here.

    python data/wikitext/prepare.py [--name=wikitext-2-raw-v1] [--input=FOLDER] [--tokens=N] [--out=DIR]
                                    [--processes=N]
    python data/wikitext/prepare.py --tokenizer=PLACE --out=DIR [--input=FOLDER]

Streams from the Hugging Face hub (Salesforce/wikitext; needs the network), or reads local files of the same form, whose
names contain train, valid and test. The published split. Rows are lines; an article begins at its title, ` = Title = `.
With --tokenizer, a model's, the lines of wikitext-2 are joined to one text per split (data/prepare_joined.py): the data of
config/compression/llama_wikitext2.py.
"""
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from commandline import ends

if __name__ == '__main__':
    ends.watch('prepare.py')

from data import documents, prepare_documents


def load(*arguments, **options):
    """load_dataset, imported where it is called: that takes seconds, and every process reads this file."""
    from datasets import load_dataset
    return load_dataset(*arguments, **options)


if __name__ == '__main__':
    prepare_documents.main(prepare_documents.Recipe(
        FOLDER, load, 'Salesforce/wikitext', ('wikitext-103-raw-v1', 'wikitext-2-raw-v1'), size=130e6,
        splits={'train': 'train', 'val': 'validation', 'test': 'test'}, begins=documents.wikitext_article,
        joined='wikitext-2-raw-v1'))
