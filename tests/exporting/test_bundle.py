"""modeling_nanokron.py: transformers computes the same with it, in a process that cannot import this repository."""
import ast
import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import export
from exporting import bundle, layouts, sources
from exporting.names import bound, outer_names
from exporting.reach import Reached
from model import GPT, GPTConfig
from tests.contract import entries, test_attention, test_linears, test_mlps
from variants import UserError

SIZES = dict(block_size=16, vocab_size=65, n_layer=2, n_head=8, n_embd=32)
# 32 -> 32, 32 -> 128 and back: specs that save parameters at all three
LINEARS = {'dense': ['dense'], 'kron': ['kron(8, 8, terms=2)', 'kron(4, 8, terms=2, scale=True)', 'kron(16, 16)',
                                        'kron(8, 8, exact_columns=2, weight_norm=True)'],
           'kron_pivot': ['kron_pivot(8, 8, terms=3)', 'kron_pivot(4, 8, terms=2, exact_columns=1)'],
           'lowrank': ['lowrank(4)', 'lowrank(3, exact_columns=2, weight_norm=True)', 'lowrank(2, guide=True)'],
           'pivot': ['pivot(5)', 'pivot(3, exact_columns=2, weight_norm=True)'],
           'abba': ['abba(2, 3, scale=True)', 'abba(2, 2)'],
           'sum': ['lowrank(2) + kron(8, 8)', 'lowrank(3, exact_columns=2) + kron(8, 8, scale=True) + abba(2, 2)']}
WHOLE = {'llama': dict(norm='rmsnorm', rope=True, mlp='swiglu(40)', n_kv_head=2, qk_norm='standard', softcap=5.0),
         'ngpt': dict(ngpt='full', rope=True), 'ngpt simple': dict(ngpt='simple'),
         'untied': dict(tie_weights=False, bias=True, value_residual=True, rope=True,
                        attention='causal(gate=True, softcap=5.0, qkv_bias=True, rope_llama3=(8.0, 1.0, 4.0, 8))'),
         'own sizes': dict(mlp={'h.0': 'swiglu(24)', 'h.1': 'relu2'}, linear={'h.0.mlp.*': 'lowrank(4)'})}
SOME = {'kron': dict(linear={'*': 'kron(8, 8, terms=2)'}, attention='window(5)'), 'own': WHOLE['own sizes'],
        'sum': dict(linear={'*.c_proj': LINEARS['sum'][0]}, rope=True, attention='mla(12, qk_rope_head_dim=4)',
                    mlp='kron_moe(4)')}
SPECS = {'linear': LINEARS, 'attention': test_attention.SPECS, 'mlp': test_mlps.SPECS}


def small(**changes):
    """A model with random parameters, gains and biases too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def exported(model, folder):
    """The folder with the model and what is asked of it; the text goes on beyond block_size."""
    info = {'kind': 'nanokron', 'step': 1, 'data': None, 'source': {}}
    raw, files = {}, {layouts.CODE: bundle.text_of(model)}
    found = layouts.with_code(model, info, '')
    raw.update(found.raw, dtype='float32')
    export.write(str(folder), layouts.Export(raw, found.tensors, '', files))
    idx = torch.randint(65, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(idx, idx)[0]
    count = 0 if any(block.attn.leaks for block in model.transformer.h) else 16
    torch.save({'idx': idx, 'logits': logits, 'prompt': idx[:, :5],
                'text': model.generate(idx[:, :5], count, temperature=0)}, folder / 'asked.pt')
    return str(folder)


def ask(folders, tmp_path):
    """The answers of a process elsewhere, by folder."""
    env = {**{name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}, 'HF_HOME': str(tmp_path / 'hf'),
           'HF_HUB_OFFLINE': '1'}
    script = Path(__file__).with_name('elsewhere.py')
    done = subprocess.run([sys.executable, '-I', script, *folders], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(cases, tmp_path):
    folders = {exported(small(**changes), tmp_path / f'model{n}'): name for n, (name, changes) in enumerate(cases.items())}
    answers = ask(folders, tmp_path)
    wrong = {folders[folder]: (distance, same, odd) for folder, (distance, same, odd) in answers.items()
             if not distance < 1e-5 or not same or odd}
    assert not wrong and len(answers) == len(cases)


@pytest.mark.slow
def test_transformers_computes_the_same_elsewhere(tmp_path):
    pytest.importorskip('transformers')
    check(SOME, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('key', ['linear', 'attention', 'mlp'])
def test_every_class_elsewhere(key, tmp_path):
    """All entries of the tables, those that a user adds too: a linear at all sites."""
    pytest.importorskip('transformers')
    assert {*SPECS['linear']} == {*test_linears.EXAMPLES}
    assert entries.TABLES[key].keys() == SPECS[key].keys() or key == 'linear'
    texts = [text for name in SPECS[key] for text in SPECS[key][name]]
    check({text: {key: {'*': text} if key == 'linear' else text} for text in texts}, tmp_path)


@pytest.mark.slow
def test_whole_models_elsewhere(tmp_path):
    pytest.importorskip('transformers')
    check(WHOLE, tmp_path)


def undefined(text):
    """Global names of a source that nothing binds."""
    tree = ast.parse(text)
    known = set().union(*map(bound, tree.body)) | {*dir(builtins)}
    return {name.id for name, _ in outer_names(tree)} - known


@pytest.mark.parametrize('changes', [*SOME.values(), *WHOLE.values()])
def test_the_file_is_complete_alone_and_the_same_every_time(changes):
    model = small(**changes)
    text = bundle.text_of(model)
    assert not undefined(text) and text == bundle.text_of(model)
    tree = ast.parse(text)
    modules = {part.module or '' for part in ast.walk(tree) if isinstance(part, ast.ImportFrom)} | {
        alias.name for part in ast.walk(tree) if isinstance(part, ast.Import) for alias in part.names}
    foreign = {name.split('.')[0] for name in modules} - {*sys.stdlib_module_names}
    assert foreign == {'torch', 'transformers'}
    names = [name for part in tree.body if not isinstance(part, ast.Expr) for name in bound(part) - {'_'}]
    assert len(names) == len({*names})                  # nothing is bound twice
    assert max(map(len, text.splitlines())) <= 140 and 'from_dense' not in text and 'def flops' not in text


def test_only_what_is_used_goes_along():
    text, other = bundle.text_of(small(linear={'h.0.mlp.*': 'lowrank(4)'})), bundle.text_of(small(attention='window(5)'))
    assert 'class LowRankLinear' in text and 'class KroneckerLinear' not in text and 'class WindowAttention' not in text
    assert 'class WindowAttention' in other and 'class LowRankLinear' not in other
    assert "LINEARS.update({'dense': Linear, 'lowrank': LowRankLinear})" in text
    mixture = bundle.text_of(small(mlp='kron_moe(4)'))              # statements that act on what is kept
    assert '@route_op.register_fake' in mixture and 'route_op.register_autograd(' in mixture


@pytest.mark.slow
def test_a_linear_of_a_users_own_file_comes_along(tmp_path, monkeypatch):
    """With what it imports from ours and a name that another module has too."""
    import variants
    (tmp_path / 'halving.py').write_text(HALVING)
    monkeypatch.syspath_prepend(tmp_path)
    known = sources.path_of
    monkeypatch.setattr(sources, 'path_of', lambda name: tmp_path / 'halving.py' if name == 'halving' else known(name))
    monkeypatch.setitem(variants.LINEARS, 'halving', 'halving:Halving')
    sources.read.cache_clear()
    model = small(linear={'h.*.mlp.*': 'halving(3)'})
    text = bundle.text_of(model)
    assert 'def halving_unit(x):' in text and 'halving_unit(self.V)' in text and 'def layers_basic_unit(x):' in text
    assert not undefined(text) and '# halves, and says so' in text and 'never called there' not in text
    monkeypatch.undo()
    sources.read.cache_clear()
    pytest.importorskip('transformers')
    found = ask([exported_text(model, text, tmp_path / 'm')], tmp_path)
    assert [(distance < 1e-5, same, odd) for distance, same, odd in found.values()] == [(True, True, [])]


HALVING = '''"""A linear of a user."""
import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.base import BaseLinear, whole


class Halving(BaseLinear):
    """y = U (V x / 2) + b."""
    tags = {'U': 'factor', 'V': 'factor', 'bias': 'vector'}

    def __init__(self, in_features, out_features, bias, rank):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        whole(rank=rank)
        self.U, self.V = nn.Parameter(torch.empty(out_features, rank)), nn.Parameter(torch.empty(rank, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.reset_parameters()

    # halves, and says so
    def forward(self, x):
        return F.linear(F.linear(x, unit(self.V)), self.U, self.bias)

    def dense_weight(self):
        return self.U @ unit(self.V)

    def flops(self, tokens):
        return 2 * tokens * self.U.numel()              # never called there

    @classmethod
    def weight_numel(cls, in_features, out_features, rank):
        return rank * (in_features + out_features)

    @classmethod
    def nearest(cls, weight, rank):
        return {'U': weight[:, :rank], 'V': weight[:rank]}


def unit(x):
    """Half of it, and no unit vector."""
    return x / 2
'''


def exported_text(model, text, folder):
    """exported with a text that was made before."""
    made = bundle.text_of
    bundle.text_of = lambda model: text
    try:
        return exported(model, folder)
    finally:
        bundle.text_of = made


@pytest.mark.parametrize('text, names', [
    ('def f(a, b=c):\n    d = a + g\n    return [h for h in d if h.x]', 'c g'),
    ('class A(B):\n    x = y\n    def f(self):\n        return x, y', 'B x y y'),
    ('f = lambda a, *b, c=d: a + b + e', 'd e f'),
    ('def f():\n    global a\n    a = 1\n    def g():\n        return f, b, h\n    b = 2', 'a f h'),
    ('try:\n    a\nexcept B as error:\n    def f():\n        return error', 'B a error'),
    ('def f():\n    with a as b, c(d) as (e, g):\n        if (h := b):\n            return h, e, g', 'a c d')])
def test_names_are_found_by_scope(text, names):
    found = sorted(name.id for name, _ in outer_names(ast.parse(text)))
    assert found == sorted(names.split())


def test_what_cannot_stand_in_one_file_is_said():
    with pytest.raises(UserError, match='imports within a function'):
        Reached().names('model', ast.parse('def f():\n    from decomposition import initialise\n    return initialise'))
    with pytest.raises(UserError, match='uses the module variants other than by its names'):
        Reached().names('model', ast.parse('x = variants'))
    found = Reached()
    found.other('nn', 'import torch.nn as nn', 'model')
    with pytest.raises(UserError, match='cannot stand in one exported file'):
        found.other('nn', 'import numpy as nn', 'model')
