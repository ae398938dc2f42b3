"""The model under torch.compile: graphs, recompilations and gradients, counted. `python -m tests.compiled [config|entries]`
prints the tables that tests/training/test_compile.py asserts; `--backend=inductor` takes the compiler proper.

Models are small, or lie on the meta device at their full width, where tracing costs no memory.
"""
import sys
import time
from dataclasses import replace

import torch

import configurator
from growth import changes
from model import GPT, GPTConfig
from optimizers import schedules
from tests.contract.test_attention import SPECS as ATTENTION
from tests.contract.test_linears import TESTED
from tests.contract.test_mlps import SPECS as MLP
from tests.tiny import ROOT
from training.startup import adopt
from variants import LINEARS, UserError

SMALL = dict(n_layer=2, n_head=8, n_embd=32, block_size=16, vocab_size=65)
# name -> rules that put the linear at every site of any attention and mlp
RULES = {
    'dense': {},
    'kron': {'*': 'kron(4, 4, terms=2)'},
    'kron_pivot': {'*': 'kron_pivot(4, 4, terms=2)'},
    'lowrank': {'*': 'lowrank(3)'},
    'pivot': {'*': 'pivot(5)'},
    'abba': {'*': 'abba(2, 2)'},
    'sum': {'*': 'lowrank(2) + kron(4, 4)'},
}
RECIPE = dict(norm='rmsnorm', rope=True, qk_norm='standard', mlp='relu2', value_residual=True, tie_weights=False,
              softcap=15.0, loss_chunk=8)
# what entries alone do not show
COMBINATIONS = {
    'one column, one row': dict(n_embd=64, linear={'h.*.mlp.*': 'kron(64, 64)'}),
    'one column, one row, recomputed': dict(n_embd=64, linear={'h.*.mlp.*': 'kron(64, 64)'}, recompute=True),
    'recipe': RECIPE,
    'recipe, tuned': dict(RECIPE, rope_half=True, rope_base=1024.0, attention_scale=0.12, embed_norm=True, embed_std=1.0,
                          head_std=0.0, hidden_gain=0.33),
    'recipe, windows': dict(RECIPE, attention='window(5, long=(0,), documents=54)'),
    'recipe, kron, recomputed': dict(RECIPE, linear={'h.*.mlp.*': 'kron(16, 8, terms=2, weight_norm=True)'}, recompute=True),
    'ngpt': dict(ngpt='full', rope=True, linear={'h.*.mlp.*': 'kron(16, 8)'}, attention='mla(12, qk_rope_head_dim=4)'),
    'guide': dict(linear={'*': 'lowrank(3, exact_columns=2, guide=True)'}),
    'mixture, recomputed': dict(mlp='kron_moe(4)', attention='mla_dint(12, qk_rope_head_dim=4)', rope=True,
                                linear={'*': 'lowrank(3)'}, value_residual=True, recompute=True),
}
TRAINED = sorted(str(p.relative_to(ROOT)) for folder in ('config', 'config/attention') for p in (ROOT / folder).glob('*.py'))


def entries():
    """{label: GPTConfig fields}: every entry of the three tables in every spec of the contract tests, and COMBINATIONS."""
    found = {f'linear {name}': dict(linear=rules) for name, rules in RULES.items()}
    found |= {f'linear {name}': dict(linear={'h.*.mlp.*': LINEARS[name].examples[0]}, mlp='swiglu(96)', n_embd=48)
              for name in TESTED if name not in RULES}                  # newcomers
    found |= {f'attention {spec}': dict(attention=spec, rope=True) for specs in ATTENTION.values() for spec in specs}
    found |= {f'mlp {spec}': dict(mlp=spec) for specs in MLP.values() for spec in specs}
    return found | COMBINATIONS


def build(**fields):
    """A small model in training mode, every parameter random, and two batches of tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.normalise_weights()
    return model, *torch.randint(65, (2, 2, 16))


def gradients(model, run, x, y):
    """(loss, {parameter: gradient}) of one call."""
    model.zero_grad()
    loss = run(x, y)[1]
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compared(fields, backend):
    """(gradients compared, names of those that differ by more than 1e-4 of their largest entry, or are not there)."""
    torch._dynamo.reset()
    model, x, y = build(**fields)
    _, eager = gradients(model, model, x, y)
    _, found = gradients(model, torch.compile(model, backend=backend, fullgraph=True), x, y)
    wrong = [name for name in eager.keys() | found.keys() if name not in found or name not in eager or not torch.allclose(
        eager[name], found[name], rtol=0, atol=1e-4 * eager[name].abs().max().item() + 1e-9)]
    return len(eager), sorted(wrong)


class Counted:
    """A backend that runs a graph as it is, and counts graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def of_config(path, **changes):
    """The Config of a file; changes: settings in place of the file's."""
    config = configurator.load([str(ROOT / path)])
    for name, value in changes.items():
        setattr(config, name, value)
    config.vocab_size = config.vocab_size or 50304
    if config.init_from.startswith('out/'):             # sizes of the run that it begins from
        adopt(config, of_config(f'config/{config.init_from[4:]}.py'))
    return config


def on_meta(config):
    """The model that training begins with, two blocks of it where its rules allow, on the meta device."""
    whole = changes.model_config(config, changes.begin(config))
    with torch.device('meta'):
        try:
            return GPT(replace(whole, n_layer=min(2, whole.n_layer)))
        except UserError:                               # its rules name later blocks
            return GPT(whole)


def steps(config, count=20):
    """(step, rows, tokens of a row) of a run of so many steps with windows, batches and contexts that grow."""
    config.max_iters, config.block_schedule = count, {0: 0.25, 0.3: 0.5, 0.6: 1}
    for step in range(count):
        length = schedules.block_size(step, config)
        yield step, config.batch_size * config.block_size // length, length


def graphs(path, count=20, **changes):
    """(graphs of the first call, graphs of the steps after it, distinct shapes) of a config's model."""
    torch._dynamo.reset()
    config, backend, shapes, first = of_config(path, **changes), Counted(), set(), None
    model = on_meta(config).train()
    run = torch.compile(model, backend=backend)
    for step, rows, length in steps(config, count):
        model.set_progress(step / count)
        x = torch.zeros(rows, length, dtype=torch.int64, device='meta')
        run(x, x)
        first, shapes = first or backend.graphs, shapes | {(rows, length)}
    return first, backend.graphs - first, len(shapes)


def graphs_of(fields):
    """Graphs of one call of a small model."""
    torch._dynamo.reset()
    (model, x, y), backend = build(**fields), Counted()
    torch.compile(model, backend=backend)(x, y)
    return backend.graphs


def recompilations(fields, count=8):
    """Graphs that a small model makes after its first call, as a run of `count` steps goes on."""
    torch._dynamo.reset()
    (model, x, y), backend = build(**fields), Counted()
    run = torch.compile(model, backend=backend)
    for step in range(count):
        model.set_progress(step / (count - 1))
        run(x, y)
    return backend.graphs - 1


def print_configs():
    for path in TRAINED:
        for recompute in (False, True):
            begin = time.time()
            try:
                first, more, shapes = graphs(path, recompute=recompute)
                print(f'{path:45} recompute={recompute!s:5} graphs {first:3} more {more:3} shapes {shapes} '
                      f'{time.time() - begin:.0f} s', flush=True)
            except Exception as error:                  # a table shows every failure
                print(f'{path:45} recompute={recompute!s:5} FAIL {type(error).__name__} {str(error).splitlines()[0][:90]}',
                      flush=True)


def print_entries(backend):
    total, bad = 0, 0
    for label, fields in entries().items():
        try:
            count, wrong = compared(fields, backend)
        except Exception as error:
            print(f'{label:70} FAIL {type(error).__name__} {str(error).splitlines()[0][:90]}', flush=True)
            continue
        total, bad = total + count, bad + len(wrong)
        print(f'{label:70} gradients {count:3} wrong {len(wrong):3} {", ".join(wrong)[:60]}', flush=True)
    print(f'torch {torch.__version__} {backend}: {len(entries())} models, {total} gradients compared, {bad} wrong')


if __name__ == '__main__':
    torch.set_num_threads(1)
    backend = next((word.split('=')[1] for word in sys.argv if word.startswith('--backend=')), 'aot_eager')
    if 'entries' in sys.argv:
        print_entries(backend)
    if 'config' in sys.argv:
        print_configs()
