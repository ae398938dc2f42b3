"""Records that back a claim: every refusal beside its positive control, and the table beside a baseline."""
import json
import re
import statistics
import subprocess
import sys

import pytest

import compare
from reporting import claims, hardware, records

DENSE, KRON = (1.7653, 1.7807, 1.7838, 1.7658, 1.7622), (1.7860, 1.7842, 1.7828, 1.7965, 1.8047)
ENV = {'parameters': 9, 'flops_per_token': 18, 'command': ['python', 'train.py'], 'commit': 'abc', 'diff': '', 'dirty': [],
       'data': 'd1', 'device': 'cpu', 'gpu': None, 'cpu': 'x', 'cpus': 2, 'threads': 1, 'world_size': 1, 'platform': 'L'}
CONFIG = {'dataset': 'shakespeare_char', 'block_size': 64, 'batch_size': 12, 'eval_iters': 0, 'max_iters': 20, 'linear': {}}


def write(folder, seed, loss, config=None, env=None, speed=100.0):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{'step': 0, 'loss': 3.0, 'tokens': 64, 'tokens_per_s': speed},
             {'step': 20, 'train_loss': loss, 'val_loss': loss, 'tokens': 640, 'flops': 1e6}]
    (folder / 'config.json').write_text(json.dumps({**CONFIG, 'seed': seed, 'out_dir': str(folder), **(config or {})}))
    (folder / 'env.json').write_text(json.dumps({**ENV, **(env or {})}))
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return str(folder)


@pytest.fixture
def pair(tmp_path):
    """The folders of five seeds of two rows."""
    def made(name, losses, speed, config):
        return [write(tmp_path / f'{name}_{seed}', seed, loss, config, speed=speed + seed % 5)
                for seed, loss in zip((1337, 1, 2, 3, 4), losses)]
    return made('kron', KRON, 200.0, {'linear': {'h.*.mlp.*': 'kron(2, 2)'}}) + made('dense', DENSE, 100.0, None)


def change(folder, config=None, env=None):
    for name, values in (('config', config), ('env', env)):
        path = f'{folder}/{name}.json'
        with open(path) as file:
            found = json.load(file)
        with open(path, 'w') as file:
            json.dump({k: v for k, v in {**found, **(values or {})}.items() if v != 'gone'}, file)


def run(folders, tmp_path, monkeypatch, capsys, *words):
    """(exit code, stdout, stderr, what stands in records/) of compare.py."""
    monkeypatch.setattr(compare, 'ROOT', str(tmp_path))
    monkeypatch.setattr(sys, 'argv', ['compare.py', *folders, *words])
    code = 0
    try:
        compare.main()
    except SystemExit as leave:
        code = leave.code
    out, err = capsys.readouterr()
    return code, out, err, sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob('records/*/*'))


REFUSED = {
    'two seeds in a row': (lambda f: f[:7], None, '', 'dense: 2 seeds (1337, 1); a claim needs 3 in every row'),
    'one run': (lambda f: f[:1], None, '', 'kron_1337: 1 seed (1337); a claim needs 3 in every row'),
    'a seed twice': (lambda f: f, {'config': {'seed': 2}}, '', 'seed 2 twice'),
    'another data set': (lambda f: f, {'config': {'dataset': 'enwik8'}, 'all': True}, '', 'dataset shakespeare_char'),
    'other files': (lambda f: f, {'env': {'data': 'd2'}}, '', 'has data d1'),
    'another context': (lambda f: f, {'config': {'block_size': 128}, 'all': True}, '', 'block_size 64'),
    'fewer windows': (lambda f: f, {'config': {'eval_iters': 5}, 'all': True}, '', 'evaluation windows the whole split'),
    'other windows': (lambda f: f, {'config': {'eval_iters': 5, 'batch_size': 6}, 'all': True}, '', '30'),
    'not at its end': (lambda f: f, {'config': {'max_iters': 30}, 'all': True}, '', 'ended at step 20 of 30'),
    'no commit': (lambda f: f, {'env': {'commit': ''}}, '', 'names no commit'),
    'dirty without its diff': (lambda f: f, {'env': {'dirty': ['model.py']}}, '', 'env.json does not hold them'),
    'no word on its diff': (lambda f: f, {'env': {'diff': 'gone'}}, '', 'env.json does not hold them'),
    'a diff that was cut': (lambda f: f, {'env': {'diff': 'x' * 200_000}}, '', 'longer than the 200,000 characters'),
    'another processor': (lambda f: f, {'env': {'cpu': 'y'}}, '--claim=speed', 'has cpu x'),
    'other threads': (lambda f: f, {'env': {'threads': 2}}, '--claim=speed', 'has threads 1'),
    'a GPU beside a CPU': (lambda f: f, {'env': {'gpu': 'H200'}}, '--claim=speed', 'has gpu None'),
    'no such baseline': (lambda f: f, None, '--baseline=denes', 'matches none of the rows: kron, dense'),
    'two baselines': (lambda f: f, None, '--baseline=*', 'matches several rows: kron, dense'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_a_record_refuses(name, pair, tmp_path, monkeypatch, capsys):
    chosen, changed, word, said = REFUSED[name]
    for folder in (pair[5:] if changed and changed.get('all') else pair[-1:] if changed else ()):
        change(folder, changed.get('config'), changed.get('env'))
    words = [word] * bool(word)
    code, out, err, kept = run(chosen(pair), tmp_path, monkeypatch, capsys, '--record=kron_mlp', *words)
    assert code == 2 and not out and not kept and len(err.splitlines()) == 1 and said in err
    if 'baseline' not in word:                          # the same runs without a claim
        code, out, err, kept = run(chosen(pair), tmp_path, monkeypatch, capsys, '--record=kron_mlp', '--claim=none')
        text = (tmp_path / kept[0].rpartition('/')[0] / 'README.md').read_text()
        assert code == 0 and len(kept) == 4 and 'No claim: n = ' in text


@pytest.mark.parametrize('words', [[], ['--baseline=dense'], ['--claim=speed', '--baseline=dense'], ['--claim=none']])
def test_a_whole_pair_is_recorded(words, pair, tmp_path, monkeypatch, capsys):
    code, out, err, kept = run(pair, tmp_path, monkeypatch, capsys, '--record=kron_mlp', *words)
    assert code == 0 and not err and [name.rpartition('/')[2] for name in kept] == ['README.md', 'config.json', 'env.json',
                                                                                    'log.jsonl']
    text = (tmp_path / kept[0]).read_text()
    assert 'standard deviation over seeds' in text
    assert ('No claim: n = 5.' if '--claim=none' in words else 'A claim on') in text


@pytest.mark.parametrize('env', [{'cpu': 'y', 'threads': 2}, {'diff': 'diff --git', 'dirty': ['model.py']},
                                 {'data': 'gone'}, {'dirty': 'gone', 'cpu': 'gone'}])
def test_what_a_claim_on_the_loss_allows(env, pair, tmp_path, monkeypatch, capsys):
    """Another processor is another draw; a diff that is there; runs of before these were noted."""
    change(pair[-1], env=env)
    assert run(pair, tmp_path, monkeypatch, capsys, '--record=x')[0] == 0


def test_numbers_beside_the_baseline(pair):
    rows = records.grouped([records.read_run(folder) for folder in pair])
    text = records.table([run for row in rows for run in row], 'dense')
    kron, dense = ([c.strip() for c in line.strip('|').split('|')] for line in text.splitlines()[2:4])
    head = [c.strip() for c in text.splitlines()[0].strip('|').split('|')]
    cells = dict(zip(head, kron))
    apart = [a - b for a, b in zip(KRON, DENSE)]
    assert cells['run'] == 'kron' and dense[0] == 'dense' and cells['n'] == '5' and dense[-4:] == ['baseline', '', '', '']
    assert cells['last val loss'] == f'{statistics.mean(KRON):.4f} ± {statistics.stdev(KRON):.4f} (n=5)'
    assert cells['beside the baseline'] == f'{statistics.mean(apart):+.4f} ± {statistics.stdev(apart):.4f} (n=5)'
    half = 2.776445 * statistics.stdev(apart) / 5 ** 0.5
    low, high = map(float, cells['95 % interval'].split(' to '))
    assert (low, high) == pytest.approx((statistics.mean(apart) - half, statistics.mean(apart) + half), abs=6e-5)
    assert float(cells['p, Welch']) > 0.99 and float(cells['p, paired']) > 0.95           # worse than dense
    assert f'kron minus dense by seed: {apart[0]:+.4f} (1337), {apart[1]:+.4f} (1)' in text
    other = records.table([run for row in rows for run in row], 'kron')
    assert float(other.splitlines()[3].strip('|').split('|')[-1]) == pytest.approx(1 - float(cells['p, paired']), abs=2e-3)


def test_speed_is_better_when_it_is_higher(pair):
    text = records.table([records.read_run(folder) for folder in pair], 'dense', 'speed')
    cells = [c.strip() for c in text.splitlines()[2].strip('|').split('|')]
    assert cells[8].startswith('+100 ± 0') and float(cells[-2]) < 1e-3


def test_seeds_that_differ_have_no_pairs(pair):
    text = records.table([records.read_run(folder) for folder in pair[:4] + pair[5:]], 'dense')
    cells = [c.strip() for c in text.splitlines()[2].strip('|').split('|')]
    assert cells[-1] == '' and cells[-2] and ' to ' in cells[-3] and '±' not in cells[-4] and 'by seed:' not in text


def test_rows_are_named_without_their_seed():
    def row(*names, seed=1337):
        return [{'folder': f'out/{name}', 'config': {'seed': seed}} for name in names]
    assert claims.name_of(row('dense_1337', 'dense_1')) == 'dense' and claims.name_of(row('dense_1337')) == 'dense_1337'
    assert claims.name_of(row('lr=0.1_seed=1', 'lr=0.1_seed=2', seed=1)) == 'lr=0.1'
    assert claims.name_of(row('1337', '1')) == '1337' and claims.name_of(row('kron11', 'x', seed=1)) == 'kron1'


def test_uncommitted_and_untracked_code_is_in_the_diff(tmp_path, monkeypatch):
    """In a small repo: a change, a new module that is loaded, and one that is not."""
    def git(*words):
        subprocess.run(['git', '-C', tmp_path, *words], check=True, capture_output=True)
    (tmp_path / 'old.py').write_text('a = 1\n')
    git('init', '-q')
    git('add', '-A')
    git('-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'x')
    monkeypatch.setattr(hardware, '__file__', str(tmp_path / 'reporting' / 'hardware.py'))
    assert hardware.changes() == {'dirty': [], 'diff': ''}
    (tmp_path / 'old.py').write_text('a = 2\n')
    (tmp_path / 'fresh.py').write_text('b = 3\n')
    (tmp_path / 'private.py').write_text('c = 4\n')
    monkeypatch.setitem(sys.modules, 'fresh', type(sys)('fresh'))
    sys.modules['fresh'].__file__ = str(tmp_path / 'fresh.py')
    found = hardware.changes()
    assert found['dirty'] == ['fresh.py', 'old.py'] and '+a = 2' in found['diff'] and '+b = 3' in found['diff']
    assert 'c = 4' not in found['diff'] and str(tmp_path) not in found['diff']


def test_our_own_environment_can_back_a_claim():
    import torch
    env = hardware.environment(torch.device('cpu'))
    assert bool(env['diff']) >= bool(env['dirty']) and all(name in env for name in claims.HARDWARE)
    assert re.fullmatch('[0-9a-f]{40}', env['commit'] or '0' * 40)
