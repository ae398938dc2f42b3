"""Models by their names on the hub: a small hub in a process of its own, programs as a user runs them."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints import hub
from data import tokenizer_json
from variants import UserError

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
TOKENS = {'tokenizer': 'gpt2', 'vocab_size': 300}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A folder of models as a hub has them: team/small, team/sharded, team/gated-one, team/pickle."""
    transformers = pytest.importorskip('transformers')
    root = tmp_path_factory.mktemp('models')
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=300,
                                                                 n_positions=32))
    for name, size in (('small', '1GB'), ('sharded', '10KB'), ('gated-one', '1GB')):
        folder = root / 'team' / name
        model.save_pretrained(folder, max_shard_size=size)
        text = json.loads(tokenizer_json.text_of(TOKENS))
        text['pre_tokenizer']['use_regex'] = False      # so that it is no GPT-2's, but the model's own
        (folder / 'tokenizer.json').write_text(json.dumps(text), encoding='utf-8')
        (folder / 'pytorch_model.bin').write_bytes(b'a pickle')
        (folder / 'modeling_own.py').write_text('raise SystemExit("code of a stranger was run")')
        (folder / 'model.onnx').write_bytes(b'x' * 1000)
    (root / 'team' / 'pickle').mkdir()
    (root / 'team' / 'pickle' / 'config.json').write_text('{}')
    (root / 'team' / 'pickle' / 'pytorch_model.bin').write_bytes(b'a pickle')
    return root


@pytest.fixture
def served(models, tmp_path):
    """(environment of programs, file with what was asked, stop) of a hub that serves the models."""
    asked = tmp_path / 'asked'
    with open(asked, 'w') as file:
        process = subprocess.Popen([sys.executable, HERE / 'fake_hub.py', models], stdout=file)
    port = ''
    while not port.endswith('\n'):
        port = asked.read_text()
        assert process.poll() is None
    environment = {'HF_ENDPOINT': f'http://127.0.0.1:{port.strip()}', 'HF_HOME': tmp_path / 'home', 'HF_HUB_OFFLINE': None,
                   'NO_PROXY': '127.0.0.1', 'HF_HUB_DISABLE_XET': '1'}

    def stop():
        process.terminate()
        process.wait()
    yield environment, asked, stop
    stop()


SAMPLE = '--num_samples=1', '--max_new_tokens=4', '--start=a', '--temperature=0'


@pytest.mark.slow
@pytest.mark.parametrize('name', ['team/small', 'team/sharded'])
def test_a_name_is_downloaded_once_and_read_without_a_network(name, served, tmp_path, run_program):
    environment, asked, stop = served
    first = run_program('sample.py', f'--init_from={name}', *SAMPLE, env=environment)
    lines = first.stderr.splitlines()
    assert len(lines) == 2 and re.fullmatch(rf'{name}: downloading \d+ files, [\d.]+ MB, to .*home/hub', lines[0])
    place = Path(lines[1].rpartition(' in ')[2])
    assert place.is_dir() and str(tmp_path / 'home') in str(place) and f'{name}: ' in lines[1]
    there = {file.name for file in place.iterdir()}
    assert {'config.json', 'tokenizer.json', 'generation_config.json'} <= there
    assert not there & {'pytorch_model.bin', 'modeling_own.py', 'model.onnx'}
    assert not re.search(r'pytorch_model|modeling|onnx', asked.read_text())
    size = float(re.search(r'([\d.]+) MB, in ', lines[1])[1])
    assert size == pytest.approx(sum(file.stat().st_size for file in place.iterdir()) / 1e6, abs=0.06)
    again = run_program('sample.py', f'--init_from={name}', *SAMPLE, env=environment)
    assert again.stderr == '' and again.stdout == first.stdout
    stop()                                              # no hub any more: the cache, whether or not it is asked
    for offline in (None, '1'):
        done = run_program('sample.py', f'--init_from={name}', *SAMPLE, env={**environment, 'HF_HUB_OFFLINE': offline})
        assert done.stderr == '' and done.stdout == first.stdout
    shards = [file for file in place.iterdir() if file.name.endswith('.safetensors')]
    shards[-1].unlink()                                 # a cache that is not whole is no model
    done = run_program('sample.py', f'--init_from={name}', *SAMPLE, env={**environment, 'HF_HUB_OFFLINE': '1'}, code=2)
    assert 'not whole in the cache' in done.stderr and 'HF_HUB_OFFLINE is set' in done.stderr


def test_a_local_folder_of_that_name_wins(served, models, tmp_path, run_program):
    environment, asked, _ = served
    shutil.copytree(models / 'team' / 'small', tmp_path / 'team' / 'small')
    before = asked.read_text()
    run_program('sample.py', '--init_from=team/small', *SAMPLE, env=environment, cwd=tmp_path)
    assert asked.read_text() == before and not (tmp_path / 'home').exists()


@pytest.mark.parametrize('name, words', [
    ('team/none', ['neither a folder here nor a model on the hub', 'hf auth login']),
    ('team/gated-one', ['is gated: accept its terms at http', 'team/gated-one', 'hf auth login']),
    ('team/pickle', ['no config.json with model.safetensors', 'a pickle'])])
def test_what_cannot_be_had_is_one_line(name, words, served, run_program):
    done = run_program('sample.py', f'--init_from={name}', *SAMPLE, env=served[0], code=2)
    last = done.stderr.splitlines()[-1]
    assert all(word in last for word in words), done.stderr
    assert 'Traceback' not in done.stderr and len([x for x in done.stderr.splitlines() if 'sample.py:' in x]) == 1


@pytest.mark.slow
def test_no_network_is_one_line(tmp_path, run_program):
    environment = {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': tmp_path, 'HF_HUB_OFFLINE': None, 'NO_PROXY': '127.0.0.1'}
    for offline, words in ((None, 'ConnectError'), ('1', 'HF_HUB_OFFLINE is set')):
        done = run_program('sample.py', '--init_from=team/small', *SAMPLE, env={**environment, 'HF_HUB_OFFLINE': offline},
                           code=2)
        assert done.stderr.count('\n') == 1 and 'run it once with the network, or pass a local folder' in done.stderr
        assert words in done.stderr or offline is None


def test_which_files_are_needed():
    names = ['model.safetensors', 'model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'config.json',
             'tokenizer.json', 'vocab.json', 'pytorch_model.bin', 'modeling_x.py', 'README.md', 'onnx/model.safetensors']
    assert hub.needed(names) == ['config.json', 'README.md', 'tokenizer.json', 'model.safetensors']
    assert hub.needed(names[1:3] + ['vocab.json', 'merges.txt']) == [
        'vocab.json', 'merges.txt', 'model.safetensors.index.json', 'model-00001-of-00002.safetensors']
    assert hub.needed(names, tokens_only=True) == ['tokenizer.json']


@pytest.mark.parametrize('place, expected', [
    ('gpt2', True), ('HuggingFaceTB/SmolLM2-135M', True), ('tests/none', False), ('a/b/c', False), ('../a', False),
    ('~/a', False), ('/a', False), ('a b', False), ('', False), ('train.py', False)])
def test_which_places_are_names(place, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert hub.is_name(place) is expected


def test_a_name_that_leads_elsewhere_is_refused():
    from pretrained import sources
    with pytest.raises(UserError, match='there is no folder'):
        sources.find('../elsewhere/model')


# ---- the tokens of a data set ----

@pytest.mark.slow
def test_the_printed_command_prepares_the_data_with_the_model_s_tokens(served, tmp_path, run_program):
    """Train on a text of other tokens, and do what the message says."""
    environment, _, _ = served
    (tmp_path / 'x.txt').write_text('the cat sat on the mat and the dog ran. ' * 60)
    run_program('data/shakespeare_char/prepare.py', f'--input={tmp_path}/x.txt', f'--out={tmp_path}/text')
    train = ['train.py', '--init_from=team/small', f'--data_dir={tmp_path}', f'--out_dir={tmp_path}/out', '--block_size=16',
             '--max_iters=1', '--batch_size=2', '--gradient_accumulation_steps=1', '--eval_iters=1', '--warmup_iters=0',
             '--device=cpu', '--compile=False', '--eval_interval=1']
    done = run_program(*train, '--dataset=text', env=environment, code=2)
    command, name = re.search(r'(python data/\S+ .*?), then --dataset=(\S+)', done.stderr.splitlines()[-1]).groups()
    assert '--tokenizer=team/small' in command and 'TEXT' in command
    words = shlex.split(command.replace('TEXT', str(tmp_path / 'x.txt')))
    assert words[0] == 'python'
    run_program(*words[1:], env=environment)
    assert (tmp_path / name / 'train.bin').exists() and name == 'text_small'
    assert 'step 1' in run_program(*train, f'--dataset={name}', env=environment).stdout


@pytest.mark.parametrize('dataset, script', [('shakespeare_char', 'shakespeare'), ('shakespeare', 'shakespeare'),
                                             ('wikitext', 'wikitext'), ('enwik8_prose', 'enwik8_prose'),
                                             ('enwik8_prose_4096', 'enwik8_prose')])
def test_a_data_set_of_this_repository_needs_no_text(dataset, script):
    from data import identity
    meta = {'tokenizer': 'hub', 'vocab_size': 300, 'json': '{}'}
    line = identity.remedy(meta, 'owner/Some-Model', ROOT / 'data' / dataset)
    assert line == (f'python data/{script}/prepare.py --tokenizer=owner/Some-Model --out={ROOT}/data/{dataset}_Some-Model, '
                    f'then --dataset={dataset}_Some-Model')


@pytest.mark.slow
def test_the_scripts_that_are_named_take_a_tokenizer(run_program):
    for script in ('shakespeare', 'wikitext', 'enwik8_prose'):
        assert '--tokenizer PLACE' in run_program(f'data/{script}/prepare.py', '--help').stdout


def test_the_command_for_shakespeare_works_as_it_is(models, tmp_path, run_program):
    from data import identity, tokenizer
    place = models / 'team' / 'small'
    meta = {'tokenizer': 'hub', 'vocab_size': 300, 'json': (place / 'tokenizer.json').read_text()}
    line = identity.remedy(meta, str(place), ROOT / 'data' / 'shakespeare_char')
    words = shlex.split(line.partition(', then')[0])
    words[-1] = f'--out={tmp_path}/made'                # not into the repository
    assert 'vocabulary: 300 (hub)' in run_program(*words[1:]).stdout
    assert identity.meaning(tokenizer.describe(json.loads((tmp_path / 'made' / 'meta.json').read_text()))) == (
        identity.meaning(meta))
