"""bench.py: what it refuses, what it counts, that its result is whole, and the maps. Nothing here depends on a clock."""
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import configurator
import variants
from bench import maps, measure, modules, subject, tables
from bench.modules import Settings
from bench.subject import Subject
from checkpoints import checkpoint
from layers.base import BaseMLP
from model import GPT, Context, GPTConfig
from tests.contract.test_attention import EXAMPLES as KEPT
from variants import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(n_embd=32, n_head=4, block_size=16, batch_size=2, vocab_size=65, min_time=0.0, tokens='1,6', device='cpu')
ARGUMENTS = [f'--{name}={value}' for name, value in SMALL.items()]

# name -> specs for n_embd 32, n_head 4, block_size 16
SPECS = {
    'causal': ['causal', 'causal(gate=True, softcap=5.0)'],
    'window': ['window(5)', 'window(6, documents=54)'],
    'linformer': ['linformer(2, chunk=4)', 'linformer(3, chunk=5, per_head=True)', 'linformer(2, chunk=4, dynamic=True)',
                  'linformer(0, chunk=4)'],
    'mla': ['mla(12, qk_rope_head_dim=4)', 'mla(20, q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4)'],
    'diff': ['diff', 'diff(version=2)'],
    'dint': ['dint', 'dint(version=2)', 'dint(head_scale=True, documents=54)'],
    'mla_diff': ['mla_diff(12, qk_rope_head_dim=4)'],
    'mla_dint': ['mla_dint(12, qk_rope_head_dim=4)'],
}
LATENT = {'mla', 'mla_diff', 'mla_dint'}                # refuse grouped queries and QK norms
EVERY = [spec for specs in SPECS.values() for spec in specs]


def small(**changes):
    return Settings(**{**SMALL, **changes})


def test_specs_cover_the_table():
    assert list(SPECS) == list(KEPT)


@pytest.fixture
def run(capsys, monkeypatch):
    """run('attention', '--key=value', ...) -> (exit code, stdout, stderr) of bench.py in this process."""
    def program(*arguments):
        monkeypatch.setattr(sys, 'argv', ['bench.py', *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / 'bench.py'), run_name='__main__')
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return program


def refusal(result):
    code, out, err = result
    assert code == 2 and out == '' and err.count('\n') == 1 and err.startswith('bench.py: '), result
    return err


# ----------------------------------------------------------------------------------------------------
# the program

def test_the_package_wins_over_the_file_of_that_name_and_brings_no_torch():
    code = 'import sys, bench, bench.modules; print(bench.__file__, "torch" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    path, torch_there = done.stdout.split()
    assert Path(path) == ROOT / 'bench' / '__init__.py' and torch_there == 'False', done


@pytest.mark.parametrize('arguments, sentence', [
    ([], 'attention, linear, mlp'),
    (['attentoin'], "did you mean 'attention'?"),
    (['attention', '--n_embed=4'], "did you mean 'n_embd'?"),
    (['attention', '--a=causal', '--b=dif'], "b: 'dif' is not one of causal"),
    (['attention', '--a=causal'], 'give --b too'),
    (['attention', '--b=causal'], 'give --a too'),
    (['attention', '--attention=diff'], '--a=SPEC beside --b=SPEC'),
    (['linear', '--linear=kron(8, 8)'], '--a=SPEC beside --b=SPEC'),
    (['linear', '--tokens=1,two'], "'1,16,512'"),
    (['attention', '--n_head=5'], 'n_head must divide n_embd'),
    (['attention', '--block_size=1'], 'at least 2'),
    (['attention', '--device=tpu'], 'device must be'),
    (['attention', '--json=no/such/folder/x.json'], 'in an existing folder'),
    (['attention', '--maps=x.png', '--text=README.md'], '--out_dir=DIR too'),
    (['attention', '--maps=x.png', '--out_dir=no/such', '--text=README.md'], "no folder 'no/such'"),
    (['attention', '--maps=x.png', '--out_dir=tests'], '--text=FILE too'),
    (['attention', '--out_dir=tests'], '--maps=FILE.png too'),
    (['attention', '--maps=x.jpg', '--out_dir=tests', '--text=README.md'], 'must end in .png'),
    (['mlp', '--maps=x.png'], 'not of mlp'),
])
def test_a_mistake_is_one_line(arguments, sentence, run):
    assert sentence in refusal(run(*arguments))


@pytest.mark.parametrize('arguments, sentence', [
    (['linear', '--a=dense', '--b=kron(5, 7)'], 'do not divide'),
    (['attention', '--a=causal', '--b=linformer(9, chunk=4)'], 'must not exceed chunk'),
    (['attention', '--linear=*=kron(5, 7)'], 'do not divide'),
    (['attention', '--a=causal', "--b=dint(version='published')"], 'sees the future, which a cache cannot hold'),
    (['attention', '--a=causal', '--b=window(4)', '--ngpt=full', '--linear=*=kron(4, 4, terms=2)'], 'cannot be normalised'),
    (['attention', '--maps=x.png', '--out_dir=tests', '--text=README.md'], 'tests holds no checkpoint'),
    (['attention', '--maps=x.png', '--out_dir=tests', '--text=no/file'], "'no/file' cannot be read"),
])
def test_a_mistake_that_a_module_finds_is_one_line_too(arguments, sentence, run):
    assert sentence in refusal(run(*arguments, *([] if '--maps=x.png' in arguments else ARGUMENTS)))


def test_json_alone_prints_one_object_with_a_row_for_every_entry(run_program):
    done = run_program('bench.py', 'attention', '--json', *ARGUMENTS)
    result = json.loads(done.stdout)
    assert done.stderr == ''
    assert [row['name'] for row in result['rows']] == list(variants.ATTENTIONS)
    assert all('note' not in row for row in result['rows'])
    assert result['baseline'] == 'causal' and result['shape']['n_embd'] == 32 and result['machine']['threads'] == 1


def test_json_to_a_file_and_the_table_to_people(tmp_path, run):
    path = tmp_path / 'linear.json'
    code, out, _ = run('linear', f'--json={path}', *ARGUMENTS)
    result = json.loads(path.read_text())
    assert code == 0 and tables.text(result) + '\n' == out
    assert [row['name'] for row in result['rows']] == list(variants.LINEARS)
    for row in result['rows']:
        assert out.count(f'\n| {row["spec"]} ') == 1 + len(row['measures'])


def test_help_names_every_setting(run):
    code, out, _ = run('attention', '--help')
    assert code == 0 and all(f'--{name}=' in out for name in configurator.settings(Settings))
    assert all(part in run('--help')[1] for part in modules.TABLES)


# ----------------------------------------------------------------------------------------------------
# rows

@pytest.mark.parametrize('part', ['attention', 'linear', 'mlp'])
def test_rows_say_what_they_measure(part):
    result = modules.run(small(), part)
    rows = {row['name']: row for row in result['rows']}
    assert list(rows) == list(modules.TABLES[part]) and next(iter(rows)) == modules.BASELINES[part]
    for row in rows.values():
        names = [(m['measure'], m['tokens']) for m in row['measures']]
        assert names == ([('decode', 1), ('forward', 6), ('forward_backward', 6)] if part == 'linear' else
                         [('forward', 32), ('forward_backward', 32), ('decode', 1)])
        assert row['parameters'] > 0 and row['flops_per_token'] > 0 and row['peak_memory'] > 0
        for m in row['measures']:
            assert 0 < m['ratio_min'] <= m['ratio'] <= m['ratio_max'] and m['rounds'] >= measure.MIN_ROUNDS
            assert m['ms'] > 0 and m['baseline_ms'] > 0
            passes = {'forward': 1, 'forward_backward': 3}.get(m['measure'], 0 if part == 'attention' else 1)
            if passes:
                work = passes * row['flops_per_token'] * m['tokens']
                assert m['flops_per_s'] * m['ms'] / 1e3 == pytest.approx(work)
            else:
                assert m['flops_per_s'] is None
    json.dumps(result, allow_nan=False)


def test_parameters_and_flops_are_those_of_the_formulas():
    C, T = 32, 16
    causal = Subject('attention', 'causal', small())
    assert causal.parameters() == 4 * C ** 2 and causal.flops() == 8 * C ** 2 + 4 * T * C
    assert Subject('mlp', 'gelu', small()).flops() == 16 * C ** 2
    assert Subject('linear', 'lowrank(3)', small(in_features=20, out_features=12)).flops() == 2 * 3 * (20 + 12)
    assert Subject('attention', 'causal', small(linear={'*': 'lowrank(3)'})).parameters() == 4 * 3 * 2 * C


def test_a_module_that_does_not_fit_says_so_in_its_row_and_the_others_are_measured():
    rows = {row['name']: row for row in modules.run(small(n_kv_head=2), 'attention')['rows']}
    assert 'set n_kv_head=None' in rows['mla']['note'] and 'measures' not in rows['mla']
    assert all('measures' in row for name, row in rows.items() if name not in LATENT)


def test_a_newcomer_is_measured_by_its_first_example_or_its_name(monkeypatch):
    monkeypatch.setitem(variants.MLPS, 'newcomer', variants.MLPS['relu2'])
    needy = type('Needy', (BaseMLP,), {'__init__': lambda self, config, site, size: None})
    monkeypatch.setitem(variants.MLPS, 'needy', needy)
    shown = type('Shown', (variants.MLPS['swiglu'],), {'examples': ['shown(hidden=40)']})
    monkeypatch.setitem(variants.MLPS, 'shown', shown)
    result = modules.run(small(), 'mlp')
    rows = {row['name']: row for row in result['rows']}
    assert rows['newcomer']['spec'] == 'newcomer' and 'measures' in rows['newcomer']
    assert rows['shown']['spec'] == 'shown(hidden=40)' and 'measures' in rows['shown']
    assert "missing a required argument: 'size'" in rows['needy']['note'] and rows['needy']['note'] in tables.text(result)


@pytest.mark.parametrize('settings', [dict(n_embd=8, n_head=2, block_size=2), dict(n_embd=6, n_head=2, block_size=7),
                                      dict(n_embd=768, n_head=12, block_size=1024)])
@pytest.mark.parametrize('part', ['attention', 'linear', 'mlp'])
def test_examples_parse_at_every_size(part, settings):
    for _, spec in modules.specs(part, small(**settings)):
        variants.parse_spec(spec, modules.TABLES[part])


@pytest.mark.parametrize('changes', [dict(dtype='bfloat16'), dict(ngpt='full', rope=True), dict(dropout=0.1),
                                     dict(qk_norm='split', value_residual=True), dict(bias=True, norm='rmsnorm')])
def test_every_class_is_measured_under_other_settings(changes):
    rows = modules.run(small(**changes), 'attention')['rows']
    refused = LATENT if 'qk_norm' in changes else set()
    assert {row['name'] for row in rows if 'note' in row} == refused


@pytest.mark.gpu
@pytest.mark.parametrize('part', ['attention', 'linear', 'mlp'])
def test_a_gpu_is_measured_by_its_allocator(part):
    settings = dict(n_embd=64, block_size=64)           # heads of 16, which FlexAttention takes
    result = modules.run(small(**settings, device='cuda', dtype='bfloat16'), part)
    assert result['clock'] == 'perf_counter' and all('measures' in row for row in result['rows'])
    assert all(row['peak_memory'] > 0 and row['peak_memory'] % 512 == 0 for row in result['rows'])


# ----------------------------------------------------------------------------------------------------
# two ways of writing one thing

@pytest.mark.parametrize('part, a, b', [('attention', 'causal', 'causal(gate=False)'),
                                        ('mlp', 'gelu', "gelu(approximate='none')"),
                                        ('linear', 'kron(4, 4)', 'kron(4, 4, terms=1)')])
def test_equal_specs_do_not_differ(part, a, b):
    result = modules.run(small(a=a, b=b), part)
    assert result['largest_difference'] == 0.0 and [row['spec'] for row in result['rows']] == [a, b]
    assert result['baseline'] == a and 'largest difference 0 ' in tables.text(result)


@pytest.mark.parametrize('part, a, b', [('mlp', 'gelu', "gelu(approximate='tanh')"), ('mlp', 'gelu', 'relu2'),
                                        ('attention', 'window(2)', 'window(8)')])      # a buffer is no weight
def test_specs_of_the_same_weights_differ_by_what_they_compute(part, a, b):
    found = modules.run(small(a=a, b=b), part)['largest_difference']
    assert found > 0
    one, two = (Subject(part, spec, small()) for spec in (a, b))
    assert found == (one.forward(2, 16)() - two.forward(2, 16)()).abs().max().item()


def test_specs_of_other_weights_are_not_compared():
    result = modules.run(small(a='dense', b='lowrank(2)'), 'linear')
    assert result['largest_difference'] is None and 'differ in name or shape' in tables.text(result)


def test_the_difference_is_with_a_s_weights():
    a, b = (Subject('linear', 'dense', small(seed=seed)) for seed in (1, 2))
    b.settings = a.settings                             # the same inputs, other weights
    assert (a.forward(1, 6)() - b.forward(1, 6)()).abs().max() > 0
    assert subject.largest_difference(a, b, 1, 6) == 0.0


# ----------------------------------------------------------------------------------------------------
# clocks, with a clock of our own

def test_two_calls_are_timed_by_turns_and_their_ratio_is_of_one_round(monkeypatch):
    order, base, call = [], object(), object()
    took = {base: iter([9, 0.25, 1, 2, 4, 8, 16]), call: iter([9, 0.5, 3, 4, 8, 24, 40])}

    def seconds(one, times, device):
        order.append((one, times))
        return next(took[one]) * (times if len(order) > 4 else 1)
    monkeypatch.setattr(measure, 'seconds', seconds)
    found = measure.side_by_side(base, call, 10.0, torch.device('cpu'))
    assert order == [(base, 2), (call, 2), (base, 1), (call, 1)] + 5 * [(base, 4), (call, 2)]
    assert found == {'ms': 8000, 'baseline_ms': 4000, 'ratio': 2.5, 'ratio_min': 2.0, 'ratio_max': 3.0, 'rounds': 5}


def test_rounds_go_on_until_both_had_their_time(monkeypatch):
    monkeypatch.setattr(measure, 'seconds', lambda one, times, device: 0.5)
    assert measure.side_by_side(1, 2, 10.0, torch.device('cpu'))['rounds'] == 20
    assert measure.side_by_side(1, 2, 0.0, torch.device('cpu'))['rounds'] == measure.MIN_ROUNDS


def test_one_thread_is_timed_by_the_processor_s_clock():
    assert modules.run(small(), 'linear')['clock'] == 'process_time'


# ----------------------------------------------------------------------------------------------------
# memory

def test_live_bytes_of_a_hand_computed_case():
    x = torch.ones(100)                                 # there before: not counted
    with measure.LiveBytes() as count:
        a = x * 2                                       # 400
        b = a.view(10, 10).t()                          # a view
        a.add_(1)
        assert count.live == count.peak == 400
        c = torch.cat((a, a))                           # 800
        assert count.live == 1200
        del a
        assert count.live == 1200                       # b holds it
        del b
        assert count.live == 800
        c = c[:1].clone()                               # 4
        assert count.live == 4
    assert count.peak == 1200
    del c
    assert count.live == 0


def test_live_bytes_sees_what_autograd_saves():
    x = torch.ones(100, requires_grad=True)

    def squares():
        y = x
        for _ in range(3):
            y = y.exp()                                 # each saves its own result
        return y
    with measure.LiveBytes() as count:
        y = squares()
        assert count.live == 3 * 400
        y = y.detach()
        assert count.live == 400                        # the graph is gone
    with measure.LiveBytes() as count, torch.no_grad():
        y = squares()
        assert count.live == 400 and count.peak == 800
    del y


def test_peak_memory_of_a_linear_step():
    """Output, gradient of the input, gradient of the weight; the gradient of the output was there before."""
    one = Subject('linear', 'dense', small(in_features=20, out_features=12))
    assert one.peak_memory(1, 6) == 4 * (6 * 12 + 6 * 20 + 12 * 20)


@pytest.mark.parametrize('spec', [specs[0] for specs in SPECS.values()])
def test_a_step_gives_every_gradient_and_leaves_nothing_behind(spec):
    one, seen = Subject('attention', spec, small(bias=True)), []
    for name, parameter in one.module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad.any().item())))
    call = one.step(2, 16)
    call()
    assert dict(seen).keys() == dict(one.module.named_parameters()).keys() and len(seen) == len(dict(seen))
    assert sum(there for _, there in seen) >= len(seen) - 1               # a key's bias moves no softmax
    with measure.LiveBytes() as count:
        call()
    assert count.live == 0 and all(p.grad is None for p in one.module.parameters())


# ----------------------------------------------------------------------------------------------------
# caches

# section 17 of the architecture sheet: floating-point numbers of a layer after S tokens, C = 32, H = 4, D = 8
CACHES = {
    'causal': lambda S: 2 * 32 * S,
    'window(5)': lambda S: 2 * 32 * min(5, S),
    'window(6, documents=54)': lambda S: 2 * 32 * min(6, S),
    'linformer(2, chunk=4)': lambda S: 2 * 32 * (S % 4 + 2 * (S // 4)),
    'linformer(0, chunk=4)': lambda S: 2 * 32 * (S % 4),
    'mla(12, qk_rope_head_dim=4)': lambda S: (12 + 4) * S,
    'mla(20, q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4)': lambda S: (20 + 4) * S,
    'diff': lambda S: 2 * 32 * S,
    'diff(version=2)': lambda S: 2 * 32 * S,
    'dint': lambda S: 2 * 32 * S + 32,
    'dint(version=2)': lambda S: 2 * 32 * S + 2 * S,
    'mla_diff(12, qk_rope_head_dim=4)': lambda S: (12 + 2 * 4) * S,
    'mla_dint(12, qk_rope_head_dim=4)': lambda S: (12 + 2 * 4) * S + 32,
}


def test_every_class_has_a_cache_formula():
    assert {spec.partition('(')[0] for spec in CACHES} == set(KEPT)


@pytest.mark.parametrize('spec', CACHES)
def test_cache_numbers_are_those_of_the_table(spec):
    one = Subject('attention', spec, small())
    for S in (1, 3, 4, 7, 8, 15):
        assert measure.filled(one.prefill(1, S))[0] == CACHES[spec](S), S
        assert measure.filled(one.prefill(3, S))[0] == 3 * CACHES[spec](S), S
    found = one.cache_per_token()
    assert found['cache_numbers_per_token'] == CACHES[spec](15) / 15
    whole_numbers = {'window(5)': 5 * 8, 'window(6, documents=54)': 2 * 6 * 8 + 8}       # positions, document numbers
    assert found['cache_bytes_per_token'] == (4 * CACHES[spec](15) + whole_numbers.get(spec, 0)) / 15


def test_cache_numbers_of_grouped_queries_and_ngpt():
    assert measure.filled(Subject('attention', 'causal', small(n_kv_head=1)).prefill(1, 7))[0] == 2 * 8 * 7
    latent = Subject('attention', 'mla(12, qk_rope_head_dim=4)', small(ngpt='full'))
    assert measure.filled(latent.prefill(1, 7))[0] == (12 + 4 + 4) * 7


@pytest.fixture
def empty_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('spec', EVERY)
def test_filled_counts_exactly_what_was_written(spec, empty_memory_is_nan):
    cache = Subject('attention', spec, small()).prefill(2, 7)
    written = sum((~t.isnan()).sum().item() for t in cache.values() if torch.is_tensor(t) and t.is_floating_point())
    assert torch.empty(3).isnan().all() and measure.filled(cache)[0] == written


@pytest.mark.parametrize('spec', EVERY)
def test_decoding_again_gives_the_same_and_it_is_what_the_whole_text_gives(spec):
    one = Subject('attention', spec, small(rope=True))
    call = one.decode(2, 8)
    first = call()
    assert all(torch.equal(call(), first) for _ in range(4))
    whole = one.apply(one.inputs(2, 9))[0][:, -1:]
    assert torch.allclose(first, whole, atol=1e-6)


# ----------------------------------------------------------------------------------------------------
# maps

def random_model(attention, **changes):
    """A model in float64 with every parameter random, and 16 tokens for it."""
    torch.manual_seed(0)
    config = GPTConfig(**{**dict(n_layer=2, n_embd=32, n_head=4, block_size=16, vocab_size=65), **changes},
                       attention=attention)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.normalise_weights()
    idx = torch.randint(65, (1, 16))
    idx[0, 9] = 54                                      # begins a document
    return model, idx


def softmax_map(q, k, scale, window=None):
    """softmax of the causal scores of q, k (H, T, D), one query at a time."""
    T, found = q.size(1), torch.zeros(q.size(0), q.size(1), q.size(1), dtype=q.dtype)
    for t in range(T):
        first = 0 if window is None else max(0, t - window + 1)
        scores = scale * torch.einsum('hd,hjd->hj', q[:, t], k[:, first:t + 1])
        found[:, t, first:t + 1] = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return found


def heads(linear, x, H):
    return torch.stack((x @ linear.dense_weight().T).chunk(H, -1))                      # (H, T, D)


def inputs_of(model, idx):
    """[x (T, C)] of each layer's attention."""
    return [x[0] for x, _ in maps.attention_inputs(model, idx)]


@pytest.mark.parametrize('changes', [{}, dict(value_residual=True), dict(n_kv_head=2), dict(bias=True)])
@pytest.mark.parametrize('T', [16, 13, 3])
def test_maps_of_a_causal_model_are_the_softmax(changes, T):
    model, idx = random_model('causal', **changes)
    found, kv = maps.attention_maps(model, idx[:, :T]), changes.get('n_kv_head', 4)
    with torch.no_grad():
        for block, x, layer in zip(model.transformer.h, inputs_of(model, idx[:, :T]), found):
            bias = [getattr(block.attn, name).bias for name in ('c_q', 'c_k')]
            q, k = heads(block.attn.c_q, x, 4), heads(block.attn.c_k, x, kv)
            if bias[0] is not None:
                q, k = (t + b.unflatten(0, (t.size(0), 1, -1)) for t, b in zip((q, k), bias))
            expected = softmax_map(q, k.repeat_interleave(4 // kv, 0), 8 ** -0.5)
            assert layer.shape == (4, T, T) and (layer - expected).abs().max() < 1e-10


def test_maps_of_a_window_are_the_softmax_of_a_band():
    model, idx = random_model('window(5)')
    with torch.no_grad():
        for block, x, layer in zip(model.transformer.h, inputs_of(model, idx), maps.attention_maps(model, idx)):
            expected = softmax_map(heads(block.attn.c_q, x, 4), heads(block.attn.c_k, x, 4), 8 ** -0.5, 5)
            assert (layer - expected).abs().max() < 1e-10


def test_maps_of_diff_are_the_difference():
    model, idx = random_model('diff')
    with torch.no_grad():
        for block, x, layer in zip(model.transformer.h, inputs_of(model, idx), maps.attention_maps(model, idx)):
            lam = block.attn.lam(x)
            q, k = heads(block.attn.c_q, x, 4), heads(block.attn.c_k, x, 4)
            both = softmax_map(q, k, 8 ** -0.5)
            expected = both[0::2] - lam * both[1::2]
            assert layer.shape == (2, 16, 16) and (layer - expected).abs().max() < 1e-10
            assert (layer.sum(-1) - (1 - lam)).abs().max() < 1e-10


@pytest.mark.parametrize('changes', [{}, dict(rope=True, value_residual=True), dict(ngpt='full', rope=True)])
@pytest.mark.parametrize('spec', EVERY)
def test_maps_of_every_class_are_lower_triangular_and_make_its_outputs(spec, changes):
    model, idx = random_model(spec, **changes)
    for block, (x, ctx), layer in zip(model.transformer.h, maps.attention_inputs(model, idx),
                                      maps.attention_maps(model, idx)):
        assert layer.triu(1).abs().max() == 0
        v, y = maps.probed(block.attn, x, maps.repeated(ctx, 1))
        H, D = layer.size(0), y.size(-1) // layer.size(0)
        again = torch.cat([layer[h] @ v[0, :, h * D:(h + 1) * D] for h in range(H)], -1)
        assert (again - y[0]).abs().max() < 1e-10
        assert 'finish' not in vars(block.attn) and not block.attn.c_proj._forward_pre_hooks


@pytest.mark.parametrize('spec, total', [('causal', 1), ('causal(softcap=5.0)', 1), ('window(5)', 1),
                                         ('mla(12, qk_rope_head_dim=4)', 1), ('dint', 1), ('dint(version=2)', 1),
                                         ('dint(head_scale=True, documents=54)', 1)])
def test_rows_of_maps_sum_to_one(spec, total):
    model, idx = random_model(spec)
    for layer in maps.attention_maps(model, idx):
        assert (layer.sum(-1) - total).abs().max() < 1e-10


def test_rows_of_diff_2_sum_to_one_less_lambda_of_the_token():
    model, idx = random_model('diff(version=2)')
    with torch.no_grad():
        for block, x, layer in zip(model.transformer.h, inputs_of(model, idx), maps.attention_maps(model, idx)):
            assert (layer.sum(-1) - (1 - block.attn.lam(x[None])[0, :, :, 0])).abs().max() < 1e-10


def test_the_leaking_forms_show_above_the_diagonal():
    model, idx = random_model("dint(version='published')")
    assert all(layer.triu(1).abs().max() > 1e-3 for layer in maps.attention_maps(model, idx))


def test_what_is_not_linear_in_its_values_has_no_map():
    model, idx = random_model('causal')
    attn = model.transformer.h[1].attn
    attn.mix_v.register_forward_hook(lambda module, inputs, v: v)       # harmless
    maps.attention_maps(model, idx)
    attn.finish = None
    attn.c_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0].tanh(),))
    with pytest.raises(UserError, match='not linear in its values'):
        maps.attention_maps(model, idx)
    attn.mix_v = nn.Identity()
    with pytest.raises(UserError, match='through heads.ValueMix'):
        maps.probed(attn, torch.zeros(1, 3, 32).double(), Context(idx[:, :3], torch.arange(3), model.config))


CHARS = sorted('\n abcdefg$^_\\')


def save(folder, **changes):
    """A checkpoint of random weights over CHARS."""
    torch.manual_seed(0)
    config = GPTConfig(**{**dict(block_size=16, vocab_size=16, n_layer=2, n_head=2, n_embd=16), **changes})
    checkpoint.save(folder, {'step': 1, 'config': configurator.as_dict(config), 'model': GPT(config).state_dict(),
                             'data': {'tokenizer': 'char', 'vocab_size': len(CHARS), 'chars': CHARS, 'source': 'a test'}})


def test_maps_are_drawn_from_a_checkpoint(tmp_path, run, monkeypatch):
    save(tmp_path, attention={'h.0': 'causal', 'h.1': 'diff'})
    text, labels, draw = 'a b$c^d_e\\f\n$' + 'abcdefg' * 3, [], maps.draw      # what matplotlib might read as formulas
    (tmp_path / 'text.txt').write_text(text)
    monkeypatch.setattr(maps, 'draw', lambda *arguments: labels.extend(arguments[3]) or draw(*arguments))
    _, out, err = run('attention', f'--maps={tmp_path / "maps.png"}', f'--out_dir={tmp_path}',
                      f'--text={tmp_path / "text.txt"}', '--json')
    result = json.loads(out)
    assert result['heads'] == [2, 1] and result['specs'] == ['causal', 'diff'] and result['tokens'] == 16
    assert labels == [maps.label(sign) for sign in text[:16]]
    assert 'of which the first 16 are read' in err and err.count('\n') == 1
    from matplotlib import image
    picture = image.imread(tmp_path / 'maps.png')
    assert min(picture.shape[:2]) > 400 and len({tuple(p) for p in picture[::9, ::9].reshape(-1, 4)}) > 20


def test_labels_are_shown_as_they_are():
    assert [maps.label(token) for token in (' ', '\n', '$', ' the')] == ['␣', '\\n', '\\$', '␣the']


def test_the_picture_has_a_title_for_every_map_and_one_scale(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    seen = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path, **more: seen.append(figure))
    signed = torch.tensor([[0.5, 0.0], [-0.25, 1.0]]).expand(2, 2, 2)
    maps.draw('x.png', [signed.abs(), signed[:1]], ['causal', 'diff'], ['a', 'b'], 'title')
    maps.draw('x.png', [signed.abs()], ['causal'], [], 'title')
    axes = [ax for ax in seen[0].axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == ['layer 0, head 0, causal', 'layer 0, head 1, causal', 'layer 1, head 0, diff']
    assert all((ax.images[0].norm.vmin, ax.images[0].norm.vmax) == (-1, 1) for ax in axes)
    assert all(ax.images[0].cmap.name == 'RdBu_r' for ax in axes)
    drawn = axes[2].images[0].get_array()
    assert drawn[1, 0] == -0.5 and drawn.mask.tolist() == [[False, True], [False, False]]
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ['a', 'b']
    assert seen[1].axes[0].images[0].norm.vmin == 0 and seen[1].axes[0].images[0].cmap.name == 'Reds'
