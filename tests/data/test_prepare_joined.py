"""wikitext-2 as published perplexities take it: joined lines, encoded at once, against transformers' own tokenizer."""
import json

import pytest
from datasets import load_dataset

from data import prepare_documents, prepare_joined
from data.dataset import open_dataset
from data.prepare_documents import Recipe
from tests.test_setup import ROOT

LINES = ' \n = Robert Boulter = \n \n Robert Boulter is an actor . <s> He was \n   \n\n = = Career = = \n \n In 2000 \n'
WORDS = {'train': 'actor', 'val': 'painter', 'test': 'writer'}
FILES = {'train': 'wiki.train.raw', 'val': 'wiki.valid.raw', 'test': 'wiki.test.raw'}
SPLITS = {'train': 'train', 'val': 'validation', 'test': 'test'}


def tokenizer_json(folder, bos):
    """A byte-pair tokenizer of these lines, which puts <s> in front of a text or not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([LINES], trainers.BpeTrainer(vocab_size=300, special_tokens=['<s>'], show_progress=False,
                                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if bos:
        start = [('<s>', made.token_to_id('<s>'))]
        made.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=start)
    folder.mkdir()
    made.save(str(folder / 'tokenizer.json'))
    return folder


def published(place, text):
    """The tokens of a raw text's rows by transformers, as GPTQ's and SVD-LLM's loaders make them of the published rows."""
    from transformers import PreTrainedTokenizerFast
    rows = [line + '\n' if line.strip() else '' for line in text.split('\n')[:-1]]
    return PreTrainedTokenizerFast(tokenizer_file=str(place / 'tokenizer.json'))('\n\n'.join(rows)).input_ids


def run(out, place, *arguments, load=load_dataset):
    recipe = Recipe(ROOT / 'data/wikitext', load, 'owner/wikitext', ('wikitext-103-raw-v1', 'wikitext-2-raw-v1'), size=1e6,
                    splits=SPLITS, joined='wikitext-2-raw-v1')
    prepare_documents.main(recipe, [f'--tokenizer={place}', f'--out={out}', *arguments])
    return {split: tokens.read(0, len(tokens)).tolist() for split, tokens in open_dataset(out, str).splits.items()}


@pytest.mark.parametrize('bos', [True, False])
def test_tokens_of_raw_files_are_transformers(tmp_path, bos):
    place, folder = tokenizer_json(tmp_path / 'model', bos), tmp_path / 'in'
    folder.mkdir()
    texts = {split: LINES.replace('actor', word) for split, word in WORDS.items()}
    for split, text in texts.items():
        (folder / FILES[split]).write_text(text)
    found = run(tmp_path / 'out', place, f'--input={folder}')
    assert found == {split: published(place, text) for split, text in texts.items()}
    start = json.loads((place / 'tokenizer.json').read_text())['model']['vocab']['<s>']
    assert all(tokens.count(start) == 1 + bos for tokens in found.values())         # the text's own, and one in front
    assert run(tmp_path / 'short', place, f'--input={folder}', '--tokens=9')['train'] == found['train'][:9]


def test_rows_of_the_hub_have_their_line_ends(tmp_path):
    place, asked = tokenizer_json(tmp_path / 'model', True), []

    def load(path, name, split, streaming):
        asked.append((path, name, split, streaming))
        rows = [line + '\n' if line.strip() else '' for line in LINES.split('\n')[:-1]]
        from datasets import Dataset
        return Dataset.from_dict({'text': rows}).to_iterable_dataset()
    found = run(tmp_path / 'out', place, load=load)
    assert found['test'] == published(place, LINES)
    assert asked == [('owner/wikitext', 'wikitext-2-raw-v1', split, True) for split in SPLITS.values()]


@pytest.mark.parametrize('options, words', [
    (['--vocab_size=4096'], '--vocab_size does not go with --tokenizer'),
    (['--shard_tokens=5M'], '--shard_tokens does not go with --tokenizer'),
    ([f'--out={ROOT / "data/wikitext"}'], '--tokenizer needs --out=DIR')])
def test_options_that_do_not_go_together(tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as left:
        run(tmp_path / 'out', tokenizer_json(tmp_path / 'model', True), *options)
    shown = capsys.readouterr().err
    assert left.value.code == 2 and words in shown and shown.count('\n') == 1


def test_data_of_documents_take_no_tokenizer(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare_documents.main(Recipe(ROOT / 'data/fineweb', None, 'owner/name', (), 1e6),
                               ['--tokenizer=x', f'--out={tmp_path}/out'])
    assert 'owner/name has documents; leave it out' in capsys.readouterr().err


def test_blank_rows_are_empty():
    assert prepare_joined.joined(['', ' = A = \n', ' \n', 'b']) == '\n\n = A = \n\n\n\n\nb\n'
