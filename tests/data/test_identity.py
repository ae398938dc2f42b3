"""What tokens mean is compared and never guessed: nanoGPT's meta.pkl, options of a tokenizer.json, models and data."""
import json
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data import hub_tokenizer, identity, meta_pickle, prepare_text, tokenizer
from data.dataset import open_dataset
from variants import UserError

TEXT = 'She sells sea shells by the sea shore, and the shells she sells are sea shells I am sure. ' * 20
CHARS = sorted(set(TEXT))
CHAR = {'tokenizer': 'char', 'chars': CHARS, 'vocab_size': len(CHARS)}


def bytes_of(merges=(('s', 'h'), ('e', 'l'))):
    """A byte-pair tokenizer of the library."""
    letters = [letter for _, letter in tokenizer.gpt2_bytes()]
    names = [*letters, *(''.join(pair) for pair in merges), '<|endoftext|>']
    library = Tokenizer(models.BPE({name: k for k, name in enumerate(names)}, list(merges)))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(['<|endoftext|>'])
    return library


def nanogpt_meta(chars=CHARS, **changes):
    return {'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {c: k for k, c in enumerate(chars)}, **changes}


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# ---- options of a tokenizer.json ----

@pytest.mark.parametrize('option', ['truncation', 'padding', 'dropout'])
def test_options_of_a_tokenizer_are_switched_off(option, tmp_path):
    library = bytes_of()
    wanted = library.encode(TEXT, add_special_tokens=False).ids
    if option == 'truncation':
        library.enable_truncation(16)
    elif option == 'padding':
        library.enable_padding(length=4 * len(wanted))
    else:
        library.model.dropout = 1.0
    library.save(str(tmp_path / 'tokenizer.json'))
    assert library.encode(TEXT, add_special_tokens=False).ids != wanted                # the option does something
    meta = hub_tokenizer.read(tmp_path)
    assert tokenizer.load(meta).encode_ordinary(TEXT) == wanted
    raw = {**meta, 'json': (tmp_path / 'tokenizer.json').read_text()}                   # as an older checkpoint holds it
    assert tokenizer.load(raw).encode_ordinary(TEXT) == wanted == tokenizer.load(raw).encode(TEXT)
    assert identity.meaning(meta) == identity.meaning(raw)


def test_a_tokenizer_without_options_stays_byte_for_byte(tmp_path):
    bytes_of().save(str(tmp_path / 'tokenizer.json'))
    assert hub_tokenizer.read(tmp_path)['json'] == (tmp_path / 'tokenizer.json').read_text()


# ---- nanoGPT's meta.pkl ----

@pytest.mark.parametrize('protocol', [0, 1, 2, 3, 4, 5])
def test_nanogpts_characters_are_read(protocol, tmp_path):
    tokens = [CHARS.index(c) for c in TEXT]
    for split in ('train', 'val'):
        np.asarray(tokens, '<u2').tofile(tmp_path / f'{split}.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(nanogpt_meta(), protocol))
    lines = []
    dataset = open_dataset(tmp_path, lines.append)
    assert dataset.tokenizer['chars'] == CHARS and dataset.vocab_size == len(CHARS) and len(lines) == 1
    assert tokenizer.load(dataset.tokenizer).decode(tokens) == TEXT


class Evil:
    def __reduce__(self):
        return print, ('run',)


@pytest.mark.parametrize('data', [
    b'', b'junk', pickle.dumps(nanogpt_meta())[:-9], pickle.dumps([1]), pickle.dumps({}),
    pickle.dumps({'itos': 5, 'stoi': 5}),
    pickle.dumps(nanogpt_meta(vocab_size=3)), pickle.dumps(nanogpt_meta(stoi={})), pickle.dumps(nanogpt_meta(extra=Evil())),
    pickle.dumps(nanogpt_meta(itos={0: Evil()})), b'}.', b'(u.', b's.', b'h\x05.', b'\x80\x04N.', b'(}(u.'])
def test_a_pickle_that_is_not_nanogpts_is_refused(data, tmp_path, capsys):
    (tmp_path / 'meta.pkl').write_bytes(data)
    assert 'a pickle is not run' in refusal(meta_pickle.read, tmp_path / 'meta.pkl')
    assert capsys.readouterr().out == ''


def test_two_thousand_damaged_pickles_raise_one_kind_of_error(tmp_path, count):
    rng, good, read = np.random.default_rng(0), pickle.dumps(nanogpt_meta(CHARS[:5])), 0
    for _ in range(2000):
        data = bytearray(good)
        for place in rng.integers(0, len(data), 2):
            data[place] = rng.integers(256)
        (tmp_path / 'meta.pkl').write_bytes(data)
        with count():
            try:
                read += len(meta_pickle.read(tmp_path / 'meta.pkl')['chars'])
            except UserError:
                pass
    assert meta_pickle.follow(good) == nanogpt_meta(CHARS[:5])


# ---- llm.c's Llama 3 ----

def llama3(path, tokens, magic=20240801):
    header = np.zeros(256, '<i4')
    header[:3] = magic, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, '<u4').tobytes())


def test_llm_cs_shards_of_llama_3_with_a_tokenizer_beside(tmp_path):
    library, lines = bytes_of(), []
    tokens = library.encode(TEXT, add_special_tokens=False).ids
    for split in ('train', 'val'):
        llama3(tmp_path / f'tiny_{split}.bin', tokens)
    assert 'put the tokenizer.json of its model beside it' in refusal(open_dataset, tmp_path, str)
    library.save(str(tmp_path / 'tokenizer.json'))
    dataset = open_dataset(tmp_path, lines.append)
    assert len(dataset.splits['train']) == len(tokens) and 'tokenizer.json' in lines[0]
    assert tokenizer.load(dataset.tokenizer).decode(dataset.splits['val'].read(0, len(tokens)).tolist()) == TEXT
    llama3(tmp_path / 'tiny_val.bin', tokens, magic=20240520)                           # negative control: of 2 bytes
    assert 'bytes for the' in refusal(open_dataset, tmp_path, str)


# ---- the rule ----

def test_gpt2s_own_tokenizer_json_is_gpt2():
    merges = [tuple(line.split(' ')) for line in tokenizer.gpt2_merges().splitlines()[1:] if line]
    own = hub_tokenizer.describe(bytes_of(merges).to_str(), 'gpt2')
    assert own['vocab_size'] == 50257 and identity.meaning(own) == identity.GPT2
    swapped = hub_tokenizer.describe(bytes_of([*merges[:-2], merges[-1], merges[-2]]).to_str(), 'other')
    assert swapped['vocab_size'] == 50257 and identity.meaning(swapped) != identity.GPT2


def test_the_form_of_a_file_is_no_meaning():
    found = json.loads(bytes_of().to_str())
    found['model']['merges'] = [' '.join(pair) for pair in found['model']['merges']]
    again = {'tokenizer': 'hub', 'vocab_size': 259, 'json': json.dumps({**found, 'version': '9'}, indent=3)}
    ours = hub_tokenizer.describe(bytes_of().to_str(), 'here')
    assert identity.meaning(again) == identity.meaning(ours)
    other = hub_tokenizer.describe(bytes_of([('s', 'h'), ('l', 'l')]).to_str(), 'x')
    assert identity.meaning(other) != identity.meaning(ours)


@pytest.mark.parametrize('data, rows, described, words', [
    (CHAR, len(CHARS), CHAR, None),
    (CHAR, len(CHARS), {**CHAR, 'source': 'x'}, None),
    (CHAR, len(CHARS), {**CHAR, 'chars': CHARS[::-1]}, 'mean other things'),
    (CHAR, 50304, identity.GPT2, 'THE_FOLDER_OF_ITS_DATA'),
    (None, 50257, identity.GPT2, None),
    (None, 50304, identity.GPT2, None),
    (None, 50257, CHAR, "GPT-2's by their number"),
    (None, 50257, {'tokenizer': 'gpt2', 'vocab_size': 4096}, "GPT-2's by their number"),
    (None, 65, {**CHAR, 'vocab_size': 64}, 'has 65 tokens and does not say what they mean'),
    (None, 65, {**CHAR, 'vocab_size': 65}, None),
    (None, 128, {**CHAR, 'vocab_size': 65}, None),
    (None, 64, {**CHAR, 'vocab_size': 65}, 'has 64 tokens')])
def test_the_rule(data, rows, described, words):
    if words is None:
        identity.check(data, rows, described, 'data', 'model')
    else:
        assert words in refusal(identity.check, data, rows, described, 'data', 'model')


def test_text_is_prepared_with_the_tokens_of_other_data(tmp_path):
    (tmp_path / 'text').write_text(TEXT)
    (tmp_path / 'short').write_text('sea shells')
    prepare_text.main('data/shakespeare_char', 'char', [f'--input={tmp_path}/text', f'--out={tmp_path}/a'])
    prepare_text.main('data/shakespeare_char', 'char', [f'--input={tmp_path}/short', f'--out={tmp_path}/b',
                                                        f'--tokenizer={tmp_path}/a'])
    assert open_dataset(tmp_path / 'b').tokenizer['chars'] == CHARS
