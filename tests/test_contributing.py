"""CONTRIBUTING.md: its example files, and one line each in variants.py, are all that a newcomer takes."""
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch

import variants
from compression import sizes
from decomposition.allocate import resolve
from decomposition.initialise import initialise
from growth import guided
from layers.basic import zero_
from model import GPT, GPTConfig
from tests import tiny
from tests.contract import entries
from tests.tiny import ROOT
from variants import UserError

PAGE = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
FILES = dict(re.findall(r'```python\n# (\S+\.py)\n(.*?)```', PAGE, re.DOTALL))
LINES = re.findall(r"'(\w+)': '([\w.]+):(\w+)',", PAGE)                 # [(name, module, class)]
KEYS = {'blockdiag': 'linear', 'alibi': 'attention', 'bilinear': 'mlp'}
SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=8, vocab_size=17)


def written(root):
    """Write the files of the page below root."""
    for path, text in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding='utf-8')


@pytest.fixture
def newcomers(tmp_path, monkeypatch):
    """The page's classes in the tables of this process, until the test is over."""
    written(tmp_path)
    for folder in ('layers', 'attention'):
        package = importlib.import_module(folder)
        monkeypatch.setattr(package, '__path__', [*package.__path__, str(tmp_path / folder)])
    for name, module, cls in LINES:
        monkeypatch.setitem(entries.TABLES[KEYS[name]], name, f'{module}:{cls}')
    yield
    for _, module, _ in LINES:
        sys.modules.pop(module, None)


def model(**fields):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **fields})).eval()


def refused(key=None, **fields):
    """The sentence with which a model is refused."""
    with pytest.raises(UserError) as error:
        model(**fields)
    assert '\n' not in str(error.value) and (key is None or error.value.key == key)
    return str(error.value)


def test_the_page_has_a_file_and_a_line_for_each_table(newcomers):
    assert {name for name, *_ in LINES} == set(KEYS) and len(FILES) == len(LINES) == 3
    for name, key in KEYS.items():
        assert not entries.lacks(key, name)
    assert all(len(text.splitlines()) <= 50 for text in FILES.values())


@pytest.mark.parametrize('linear', ['blockdiag(4)', 'lowrank(4) + blockdiag(4)', 'blockdiag(8) + kron(8, 8)'])
def test_the_linear_stands_everywhere(newcomers, linear):
    x = torch.arange(8)[None]
    first = model(linear={'h.*.mlp.*': linear}, zero_init=True)
    assert not any(first.transformer.h[i].mlp.c_proj.dense_weight().any() for i in (0, 1))
    first.train()(x, x)[1].backward()
    assert first.transformer.h[0].mlp.c_proj.get_parameter(
        first.transformer.h[0].mlp.c_proj.zero_factor.split()[0]).grad.any()
    other = model(linear={'h.*.mlp.*': linear}, attention='alibi', mlp='bilinear(64)')
    before = other(x, x)[0]
    other.add_block()
    assert torch.equal(other(x, x)[0], before)
    assert {row['spec'] for row in other.site_table()} == {'dense', linear}
    other.realise()
    assert (other(x, x)[0] - before).abs().max() < 1e-5 and {row['spec'] for row in other.site_table()} == {'dense'}


@pytest.mark.parametrize('fields, words', [
    (dict(linear='blockdiag(1)'), 'saves nothing: 1,024 parameters where dense has 1,024; blocks=2 saves some'),
    (dict(linear='blockdiag(5)'), 'blocks=5 must divide 32 inputs and 32 outputs'),
    (dict(linear='blockdiag(0)'), 'blocks=0 must be a whole number of at least 1'),
    (dict(linear='blockdiag'), 'it takes blockdiag(blocks)'),
    (dict(linear='lowrank(8) + blockdiag(1)'), 'in blockdiag(1), blocks=4 saves some'),
    (dict(linear='blockdiag(4)', ngpt='full'), 'BlockDiagonal defines no normalise_(dim); take another linear, or ngpt='),
    (dict(attention='alibi(2)'), 'it takes alibi()'),
    (dict(mlp='bilinear(-1)'), 'hidden=-1 must be a whole number of at least 1'),
])
def test_a_spec_that_does_not_fit_is_one_sentence_with_the_remedy(newcomers, fields, words):
    assert words in refused(**fields)


def test_a_method_that_it_does_not_know_is_refused_with_those_that_it_knows(newcomers):
    source = model()
    with pytest.raises(UserError, match="method='nonsense' is unknown; blockdiag knows van_loan"):
        initialise(model(linear={'h.*.mlp.*': 'blockdiag(4)'}), source.config, source.state_dict(), 'nonsense')
    target = model(linear={'h.*.mlp.*': 'blockdiag(4)'})
    rows = initialise(target, source.config, source.state_dict(), 'als, van_loan')
    W, kept = (m.transformer.h[1].mlp.c_fc.dense_weight() for m in (source, target))
    assert torch.equal(kept, W * (kept != 0)) and sum(row['error'] > 0 for row in rows) == 4
    cls = variants.LINEARS['blockdiag']
    with pytest.raises(ValueError, match='BlockDiagonal knows van_loan'):
        cls.from_dense(torch.randn(8, 8), None, method='nonsense', blocks=2)


def test_budgets_and_guides_are_refused_with_what_would_do(newcomers):
    config = GPTConfig(**SMALL, linear={'h.*.mlp.*': 'blockdiag(4)'})
    config.rank_budget, config.rank_allocation = 0.5, 'uniform'
    with pytest.raises(UserError, match='rank_budget knows no size of blockdiag; give it rules of lowrank'):
        resolve(config)
    for kind, words in (('uniform', 'rank_budget knows no size of blockdiag'), ('given', r'given sizes take 0\.2500')):
        with pytest.raises(UserError, match=words):     # compress.py
            sizes.fitted(config, types.SimpleNamespace(linear=config.linear, sizes=kind), 0.5, '*.mlp.*')
    given = types.SimpleNamespace(linear=config.linear, sizes='given')
    assert sizes.fitted(config, given, 0.25, '*.mlp.*') == config.linear
    with pytest.raises(UserError, match='self_guided needs structures that take guide=True, and blockdiag'):
        guided.fields(config)


# ---------------------------------------------------------------------------------------------------
# what a class lacks is said by name, by the contract tests and by a run

MEMBERS = {'blockdiag': ('tags', 'forward', 'dense_weight', 'flops', 'weight_numel', 'nearest', 'examples'),
           'alibi': ('forward', 'flops', 'examples'), 'bilinear': ('forward', 'examples')}


@pytest.mark.parametrize('name, member', [(name, member) for name in MEMBERS for member in MEMBERS[name]])
def test_what_is_missing_is_named(newcomers, name, member):
    table = entries.TABLES[KEYS[name]]
    cls = table[name]
    delattr(cls, member)
    assert re.search(rf'{cls.__name__} lacks {member}: define', entries.lacks(KEYS[name], name))
    with pytest.raises(pytest.fail.Exception, match=f'{name}: {cls.__name__} lacks {member}: define'):
        entries.complete(KEYS[name], name, ())
    assert name not in entries.specs(KEYS[name], ())
    spec = {'blockdiag': 'blockdiag(4)', 'alibi': 'alibi', 'bilinear': 'bilinear(64)'}[name]
    if member != 'examples':                            # which a run needs not
        assert f'{cls.__name__} lacks {member}: define' in refused(KEYS[name], **{KEYS[name]: spec})
    if member not in ('examples', 'tags') and name == 'blockdiag':
        assert f'lacks {member}: define' in refused(linear='lowrank(2) + blockdiag(4)')


@pytest.mark.parametrize('name', KEYS)
def test_a_class_without_the_base_is_told_to_take_it(newcomers, monkeypatch, name):
    table, key = entries.TABLES[KEYS[name]], KEYS[name]
    monkeypatch.setitem(table, name, type('Plain', (torch.nn.Module,), {'__init__': lambda self, *a, **b: None}))
    assert 'derive it from layers.base.Base' in entries.lacks(key, name)
    assert 'derive it from layers.base.Base' in refused(key, **{key: name})


@pytest.mark.parametrize('entry, words', [
    ('layers.blockdiga:BlockDiagonal', "there is no module layers.blockdiga; write 'folder.file:Class'"),
    ('layers.blockdiag:BlockDiagonl', "layers.blockdiag has no class 'BlockDiagonl', did you mean 'BlockDiagonal'"),
    ('layers.blockdiag', "layers.blockdiag has no class ''"),
])
def test_a_line_that_names_nothing_is_one_sentence(newcomers, monkeypatch, entry, words):
    monkeypatch.setitem(variants.LINEARS, 'blockdiag', entry)
    assert words in refused(linear='blockdiag(4)')


@pytest.mark.parametrize('name, examples, words', [
    ('blockdiag', ['blockdig(4)'], 'which is no spec of blockdiag'), ('blockdiag', ['blockdiag(4'], 'is not a spec'),
    ('blockdiag', ['blockdiag(4, 5)'], 'it takes blockdiag(blocks)'), ('alibi', 'alibi', 'define the list examples'),
])
def test_an_example_that_is_none_is_named(newcomers, name, examples, words):
    entries.TABLES[KEYS[name]][name].examples = examples
    assert words in entries.lacks(KEYS[name], name)


def test_a_parameter_without_a_tag_and_an_error_of_its_own_are_named(newcomers):
    alibi, linear = variants.ATTENTIONS['alibi'], variants.LINEARS['blockdiag']
    alibi.__init__ = then(alibi.__init__, lambda self: self.register_parameter('sink', torch.nn.Parameter(torch.zeros(8))))
    assert "attn.sink has no tag; add 'sink' to ALiBiAttention.tags" in entries.lacks('attention', 'alibi')
    linear.__init__ = then(linear.__init__, lambda self: self.nothing)
    assert re.search(r"'blockdiag\(4\)' cannot be built: AttributeError: .*'nothing'", entries.lacks('linear', 'blockdiag'))


def then(init, more):
    """An __init__ of the same signature that does something more."""
    @functools.wraps(init)
    def longer(self, *arguments, **named):
        init(self, *arguments, **named)
        more(self)
    return longer


def test_what_init_forgets_is_named(newcomers):
    variants.LINEARS['blockdiag'].__init__ = lambda self, inputs, outputs, bias, blocks: torch.nn.Module.__init__(self)
    assert 'BlockDiagonal sets no self.in_features; its __init__ must' in refused(linear='blockdiag(4)')


def test_nearest_must_give_every_parameter(newcomers):
    cls = variants.LINEARS['blockdiag']
    cls.nearest = classmethod(lambda cls, weight, blocks: {})
    with pytest.raises(ValueError, match='BlockDiagonal.nearest gives bias, and the module holds W, bias; give each'):
        cls.from_dense(torch.randn(8, 8), torch.zeros(8), blocks=2)


def test_zeros_go_to_the_first_factor(newcomers):
    module = variants.LINEARS['blockdiag'](8, 8, True, 2)
    zero_(module)
    assert type(module).zero_factor == 'W' and not module.dense_weight().any()


# ---------------------------------------------------------------------------------------------------
# the programs and the contract tests, in a copy of the repository with those files and lines

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """The root of a copy; records and outputs stay behind."""
    root = tmp_path_factory.mktemp('copy') / 'nanokron'
    behind = '.*', 'out', 'records', '*.bin', '__pycache__', 'golden', 'shared'
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*behind))
    written(root)
    text = (root / 'variants.py').read_text(encoding='utf-8')
    for name, module, cls in LINES:
        head = f'{ {"linear": "LINEARS", "attention": "ATTENTIONS", "mlp": "MLPS"}[KEYS[name]]} = Table({{\n'
        assert head in text
        text = text.replace(head, f"{head}    '{name}': '{module}:{cls}',\n")
    (root / 'variants.py').write_text(text, encoding='utf-8')
    return root


@pytest.mark.slow
@pytest.mark.parametrize('name', KEYS)
def test_the_contract_tests_pass_without_a_line_of_their_own(copy, name):
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/contract', '-k', name,
                           '-m', 'not slow'], cwd=copy, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) >= {'linear': 60, 'attention': 100, 'mlp': 8}[KEYS[name]]


@pytest.mark.slow
def test_the_programs_take_them(copy, tmp_path, run_program):
    """Training for two steps, going on, evaluation, sampling, export and decomposition of a dense run."""
    data, out = tiny.make_data(tmp_path / 'data'), tmp_path / 'run'
    short = ['--max_iters=2', '--eval_interval=2', '--lr_decay_iters=2', '--warmup_iters=1']
    theirs = [*short, '--linear=h.*.mlp.*=blockdiag(4)', '--attention=alibi', '--mlp=bilinear(64)']
    run_program(copy / 'train.py', *tiny.arguments(data, out, *theirs))
    run_program(copy / 'train.py', *tiny.arguments(data, out, *theirs, '--max_iters=4', '--init_from=resume'))
    table = run_program(copy / 'train.py', *tiny.arguments(data, tmp_path / 'dry', *theirs, '--dry_run=True')).stdout
    assert table.count('blockdiag(4)') == 6
    assert 'nats per' in run_program(copy / 'evaluate.py', f'--out_dir={out}', '--dataset=tiny', f'--data_dir={data}').stdout
    run_program(copy / 'sample.py', f'--out_dir={out}', '--start=the', '--num_samples=1', '--max_new_tokens=5')
    dense = tmp_path / 'dense'
    run_program(copy / 'train.py', *tiny.arguments(data, dense, *short, '--linear=dense'))
    heal = tiny.arguments(data, tmp_path / 'healed', *short, f'--init_from={dense}', '--linear=*.mlp.*=blockdiag(4)')
    assert 'blockdiag(4), relative error' in run_program(copy / 'train.py', *heal).stdout
    run_program(copy / 'export.py', f'--out_dir={out}', f'--to={tmp_path / "exported"}')
    read = ('import sys, torch, transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], '
            'trust_remote_code=True); print(tuple(m(torch.tensor([[1, 2, 3]])).logits.shape[:2]))')
    done = subprocess.run([sys.executable, '-I', '-c', read, tmp_path / 'exported'], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, 'HF_HOME': str(tmp_path / 'hf')})
    assert done.stdout.endswith('(1, 3)\n'), done.stderr[-3000:]
    done = run_program(copy / 'train.py', *heal, '--decompose=nonsense', code=2)
    assert done.stderr.count('\n') == 1 and 'blockdiag knows van_loan' in done.stderr
    done = run_program(copy / 'bench.py', 'linear', '--json', '--n_embd=32', '--n_head=4', '--min_time=0', '--tokens=1',
                       '--device=cpu')
    assert '"spec": "blockdiag(4)"' in done.stdout and '"note"' not in done.stdout
