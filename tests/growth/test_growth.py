"""Growing, freezing and realising a model: model.add_block, freeze_block, realise; growth/changes.py."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import configurator
import train
from checkpoints import checkpoint
from decomposition import initialise
from growth import changes, recovery
from model import GPT, GPTConfig, UserError
from optimizers import optim
from tests.tiny import arguments, make_data

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=61)
KINDS = {'gpt2': {}, 'bias': dict(bias=True), 'llama': dict(rope=True, norm='rmsnorm', mlp='swiglu', tie_weights=False),
         'kron': dict(linear={'*': 'kron(4, 4)'}), 'lowrank': dict(linear='lowrank(4)', bias=True),
         'value residual': dict(value_residual=True), 'latent': dict(mlp='latent(6)'),
         **{name: dict(attention=spec) for name, spec in {
             'window': 'window(5)', 'linformer': 'linformer(2, chunk=4)', 'mla': 'mla(8, qk_rope_head_dim=4)',
             'diff': 'diff', 'diff 2': 'diff(version=2)', 'dint': 'dint', 'gate': 'causal(gate=True)'}.items()}}


def small(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **settings}))


def tokens():
    return torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize('name', KINDS)
def test_g1_a_new_block_moves_no_logit_by_one_bit(name):
    model, x = small(**KINDS[name]).eval(), tokens()
    before = model(x, x)[0]
    block = model.add_block()
    assert torch.equal(model(x, x)[0], before)
    assert model.config.n_layer == 3 and block is model.transformer.h[2]
    with torch.no_grad():                                               # and it is there
        for p in block.parameters():
            p.add_(0.1)
    assert not torch.equal(model(x, x)[0], before)


@pytest.mark.parametrize('kind', ['full', 'simple'])
def test_g1_under_ngpt_a_new_block_takes_no_step(kind):
    model, x = small(ngpt=kind, rope=True, tie_weights=False).eval(), tokens()
    before = model(x, x)[0]
    model.add_block()
    assert (model(x, x)[0] - before).abs().max() < 1e-5
    weight = model.transformer.h[2].attn.c_q.weight
    assert (weight.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize('name', KINDS)
def test_every_parameter_of_a_new_block_learns(name):
    model, x = small(**KINDS[name]), tokens()
    model.add_block()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(x, x.roll(1, 1))[1].backward()
        optimizer.step()
    still = [n for n, p in model.transformer.h[2].named_parameters() if not p.grad.any()]
    assert not still or name in ('diff', 'dint') and all('lambdas' in n for n in still)


def test_the_config_rebuilds_the_grown_model():
    model, x = small(linear={'h.0.mlp.*': 'kron(4, 4)'}).eval(), tokens()
    model.add_block(linear='lowrank(3)', attention='diff', mlp='relu2')
    model.add_block(linear={'h.3.mlp.c_fc': 'kron(8, 8)'})
    specs = {site: module.spec for site, module in model.sites().items()}
    assert specs['h.2.attn.c_q'] == 'lowrank(3)' and specs['h.3.mlp.c_fc'] == 'kron(8, 8)'
    assert specs['h.0.mlp.c_fc'] == 'kron(4, 4)' and specs['h.3.attn.c_q'] == specs['h.1.mlp.c_fc'] == 'dense'
    assert [type(b.attn).__name__ for b in model.transformer.h][2] == 'DifferentialAttention'
    again = GPT(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x, x)[0], model(x, x)[0])


def test_what_does_not_fit_is_refused_in_one_sentence():
    with pytest.raises(UserError, match='saves nothing'):
        small().add_block(linear='lowrank(99)')


@pytest.mark.parametrize('optimizer', ['adamw', 'muon', 'orthograd'])
def test_g1_a_frozen_block_stays_bit_equal(optimizer):
    model, x = small(linear={'h.*.mlp.*': 'kron(4, 4, terms=2)'}), tokens()
    config = configurator.load([f'--optimizer={"muon" if optimizer == "muon" else "adamw"}', '--weight_decay=0.5',
                                f'--orthograd={optimizer == "orthograd"}', '--muon_weight_decay=0.5',
                                '--learning_rate=0.01'])
    step = optim.build(model, config, 'cpu')
    for _ in range(3):                                                  # momentum that must not go on
        model(x, x)[1].backward()
        step.step()
        step.zero_grad()
    model.freeze_block(0)
    kept = {n: p.clone() for n, p in model.transformer.h[0].named_parameters()}
    other = model.transformer.h[1].attn.c_q.weight.clone()
    fresh = optim.build(model, config, 'cpu')
    optim.load_state_by_name(fresh, model, optim.state_by_name(step, model))
    for _ in range(20):
        model(x, x)[1].backward()
        fresh.step()
        fresh.zero_grad()
    assert all(torch.equal(p, kept[n]) for n, p in model.transformer.h[0].named_parameters())
    assert not torch.equal(other, model.transformer.h[1].attn.c_q.weight)
    model.unfreeze_block(0)
    assert all(p.requires_grad for p in model.parameters())


def test_g1_an_optimizer_that_keeps_frozen_parameters_would_move_them():
    """The negative control: AdamW's decay moves a tensor whose gradient is zero."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.1)
    p.grad = torch.zeros(3)
    optimizer.step()
    assert not torch.equal(p, torch.ones(3))


@pytest.mark.parametrize('linear', ['kron(4, 4, terms=2, scale=True)', 'lowrank(5)',
                                    {'h.*.mlp.*': 'kron(8, 4)', '*.attn.c_proj': 'lowrank(4)'}])
@pytest.mark.parametrize('more', [dict(bias=True), dict(rope=True, mlp='latent(8, norm=True)'),
                                  dict(attention='mla(8, qk_rope_head_dim=4)')], ids=str)
def test_realised_models_are_the_same_function(linear, more):
    model, x = small(linear=linear, **more).eval(), tokens()
    before, cached = model(x, x)[0], model.generate(x, 4, temperature=0)
    model.realise()
    assert all(module.spec == 'dense' for module in model.sites().values()) and model.config.linear == {}
    assert (model(x, x)[0] - before).abs().max() < 1e-5
    assert torch.equal(model.generate(x, 4, temperature=0), cached)
    model(x, x)[1].backward()
    assert all(p.grad is not None for p in model.parameters())
    again = GPT(model.config)
    again.load_state_dict(model.state_dict())


def test_realising_keeps_frozen_sites_frozen():
    model = small(linear='lowrank(4)')
    model.freeze_block(1)
    model.realise()
    assert not any(p.requires_grad for p in model.transformer.h[1].parameters())
    assert all(p.requires_grad for p in model.transformer.h[0].parameters())


# ----------------------------------------------------------------------------------------------------
# in training

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(data, out, *more):
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load([*arguments(data, out), *more]))
    return checkpoint.load(out)


def same(a, b):
    return a['model'].keys() == b['model'].keys() and all(torch.equal(t, b['model'][n]) for n, t in a['model'].items())


WAYS = {
    'every': ['--n_layer=4', '--grow_from=2', '--grow_every=3', '--grow_rewarm=2'],
    'freeze': ['--n_layer=4', '--grow_from=1', '--grow_every=3', '--grow_freeze=True',
               '--linear=h.*.mlp.*=kron(8, 8); h.3.attn.c_v=lowrank(4)'],
    'copy': ['--n_layer=3', '--grow_from=1', '--grow_every=4', '--grow_init=copy', '--linear=h.*.mlp.*=kron(8, 8)'],
    'stack': ['--n_layer=3', '--grow_from=2', '--grow_every=5', '--grow_init=stack', '--linear=h.*.mlp.*=kron(8, 8)',
              '--ema_decay=0.9'],
    'dense': ['--finish_dense_at=0.5', '--grow_rewarm=2'],
    'estimate': ['--finish_dense_at=0.5', '--finish_dense_state=estimate', '--ema_decay=0.5'],
    'muon': ['--n_layer=3', '--grow_from=2', '--grow_every=4', '--optimizer=muon', '--finish_dense_at=0.75'],
}


@pytest.mark.parametrize('way', WAYS)
def test_runs_that_grow_or_become_dense_resume_to_the_same_bits(data, tmp_path, way):
    whole = run(data, tmp_path / 'a', *WAYS[way], '--save_interval=1', '--keep_checkpoints=20')
    assert whole['step'] == 12
    for step in (3, 5, 6, 7, 9):                            # before, at and after the changes
        (tmp_path / f'{step}').mkdir()
        for file in (tmp_path / 'a').glob(f'ckpt_{step:08d}*'):
            shutil.copy(file, tmp_path / f'{step}')
        train.main(configurator.load([f'--out_dir={tmp_path / str(step)}', '--init_from=resume', '--save_interval=0']))
        again = checkpoint.load(tmp_path / str(step))
        assert same(whole, again), step
        assert all(torch.equal(v, again['optimizer'][n][k]) for n, e in whole['optimizer'].items() for k, v in e.items())


def test_a_grown_checkpoint_has_its_layers_and_is_read(data, tmp_path):
    state = run(data, tmp_path, *WAYS['freeze'], '--save_interval=1', '--keep_checkpoints=20')
    layers = {}
    for path in sorted(tmp_path.glob('ckpt_*.pt')):
        saved = checkpoint.load(path)
        layers[saved['step']] = saved['built']['layers']
        assert len({n.split('.')[2] for n in saved['model'] if '.h.' in n}) == saved['built']['layers']
    assert [layers[s] for s in (1, 3, 4, 6, 7, 9, 10, 12)] == [1, 1, 2, 2, 3, 3, 4, 4]
    config, weights, _ = initialise.read_folder(str(tmp_path))
    assert config.n_layer == 4 and initialise.build(config, config, weights)
    for path in tmp_path.glob('ckpt_000000[01][0-9]*'):
        if '00000005' not in path.name:
            path.unlink()
    config, weights, _ = initialise.read_folder(str(tmp_path))              # two layers, and no rule for the fourth yet
    assert config.n_layer == 2 and initialise.build(config, config, weights) and state['built']['layers'] == 4


def test_frozen_blocks_do_not_move_and_the_newest_does(data, tmp_path):
    run(data, tmp_path, *WAYS['freeze'], '--save_interval=1', '--keep_checkpoints=20')
    at = {step: checkpoint.load(tmp_path / f'ckpt_{step:08d}.pt')['model'] for step in (4, 6, 7, 9)}
    moved = lambda a, b, i: [n for n, t in at[a].items() if f'.h.{i}.' in n and not torch.equal(t, at[b][n])]     # noqa: E731
    assert not moved(4, 6, 0) and moved(4, 6, 1)
    assert not moved(7, 9, 0) and not moved(7, 9, 1) and moved(7, 9, 2)


def test_a_plateau_adds_a_block(data, tmp_path):
    more = ['--n_layer=3', '--grow_from=1', '--grow_on_plateau=True', '--eval_interval=1', '--learning_rate=0', '--min_lr=0',
            '--linear=h.*.mlp.*=kron(8, 8)']
    state = run(data, tmp_path, *more, '--save_interval=1', '--keep_checkpoints=20')
    layers = [checkpoint.load(p)['built']['layers'] for p in sorted(tmp_path.glob('ckpt_*.pt'))]
    assert layers == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3] and state['step'] == 12


def test_dense_finish_ends_dense_and_the_estimate_is_the_factors_moments(data, tmp_path):
    state = run(data, tmp_path, *WAYS['estimate'])
    assert not any(name.endswith(('.A', '.B', '.U', '.V')) for name in state['model'])
    assert state['built']['dense'] and initialise.read_folder(str(tmp_path))[0].linear == {}


def test_the_estimate_of_a_full_gradient():
    """Factors whose moments come from one dense gradient G within the span: exp_avg points along G."""
    torch.manual_seed(0)
    model = small(linear={'h.0.mlp.c_fc': 'lowrank(20)'}, n_layer=1).double()
    module, G = model.transformer.h[0].mlp.c_fc, None
    weight = module.dense_weight().detach()
    G = torch.randn_like(weight)
    state = {f'transformer.h.0.mlp.c_fc.{f}': {'step': torch.tensor(1.0), 'exp_avg': g, 'exp_avg_sq': g.square()}
             for f, g in (('U', G @ module.V.detach().T), ('V', module.U.detach().T @ G))}
    entry = changes.estimates(model, state)['transformer.h.0.mlp.c_fc.weight']
    cosine = (entry['exp_avg'] * G).sum() / entry['exp_avg'].norm() / G.norm()
    assert cosine > 0.6 and 0.3 < entry['exp_avg'].norm() / G.norm() < 3
    assert entry['exp_avg_sq'].shape == G.shape and 0.1 < entry['exp_avg_sq'].mean() / G.square().mean() < 10
    assert 'transformer.h.0.attn.c_q.weight' not in changes.estimates(model, state)


# ----------------------------------------------------------------------------------------------------
# training FLOPs

def counted(model):
    """Matrix products of a forward and backward pass per token, as torch counts them; scores and the head's own apart."""
    x = tokens()
    with FlopCounterMode(display=False) as counter:
        model(x, x)[1].backward()
    total = counter.get_flop_counts()['Global']
    return sum(n for op, n in total.items() if str(op) in ('aten.mm', 'aten.addmm')) / x.numel()


@pytest.mark.parametrize('name, frozen', [('all', ()), ('first', (0,)), ('two', (0, 1)), ('last', (2,))])
def test_training_flops_are_those_of_the_matrix_products(name, frozen):
    model = small(n_layer=3, attention='causal')
    for index in frozen:
        model.freeze_block(index)
    attention = 3 * sum(block.attn.flops(16) for block in model.transformer.h)         # embeddings train: all are reached
    assert changes.training_flops(model) - attention == counted(model)
    assert name != 'all' or changes.training_flops(model) == 3 * model.flops_per_token()


def test_training_flops_end_where_no_gradient_goes():
    model = small(n_layer=3, tie_weights=False)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith('transformer.h.2'))
    site = sum(module.flops(16) // 16 for module in model.sites().values()) // 3
    scores = model.transformer.h[0].attn.flops(16)
    assert changes.training_flops(model) == (1 + 1 + 3) * (site + scores) + 2 * 2 * 61 * 32
    assert changes.training_flops(model) - 5 * scores == counted(model)


def test_evaluation_lines_hold_training_flops_that_follow_growth(data, tmp_path):
    run(data, tmp_path, *WAYS['freeze'], '--eval_interval=1')
    lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    flops = {line['step']: line['flops'] for line in lines if 'val_loss' in line}
    steps = [flops[i + 1] - flops[i] for i in range(12)]
    assert flops[0] == 0 and len(set(steps)) == 4 and steps == sorted(steps) and steps[0] == steps[2] < steps[3]
    config = configurator.load(arguments(data, tmp_path, *WAYS['freeze'], '--vocab_size=61'))
    config.vocab_size = checkpoint.load(tmp_path)['config']['vocab_size']
    model = GPT(configurator.model_config(config))
    for index in range(3):
        model.freeze_block(index)
    assert steps[-1] == 2 * 4 * 16 * changes.training_flops(model) < 2 * 4 * 16 * 3 * model.flops_per_token()


def test_the_loss_is_watched_around_changes(data, tmp_path):
    run(data, tmp_path, '--finish_dense_at=0.5', '--grow_report=2')
    lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    change = [line for line in lines if 'change' in line]
    assert [(line['step'], line['change']) for line in change] == [(6, 'every site is dense from here')]
    assert abs(change[0]['probe_before'] - change[0]['probe_after']) < 1e-5
    probes = {line['step']: line['probe_loss'] for line in lines if 'probe_loss' in line}
    assert list(probes) == [6, 8, 10, 12] and probes[6] == change[0]['probe_after']
    spike = max(probes.values()) - change[0]['probe_before']
    assert recovery.switch_spike(lines) == spike and recovery.switch_spike([]) is None


def test_flops_to_a_baselines_loss_are_read_between_evaluations(tmp_path, run_program):
    curve = lambda *losses: [{'step': i, 'flops': 100 * i, 'val_loss': loss} for i, loss in enumerate(losses)]    # noqa: E731
    assert recovery.flops_to(curve(4.0, 3.0, 2.0), 2.5) == 150 and recovery.flops_to(curve(4.0, 3.0), 3.0) == 100
    assert recovery.flops_to(curve(4.0, 3.0, 3.5), 2.9) is None and recovery.flops_to(curve(4.0, 3.0), 5.0) == 0
    for name, seed, losses in (('dense', 1, (4, 3, 2)), ('dense', 2, (4, 3, 2.2)), ('grown', 1, (4, 2.2, 1.8)),
                               ('grown', 2, (4, 3, 2.4))):
        folder = tmp_path / name / f'seed={seed}'
        folder.mkdir(parents=True)
        (folder / 'config.json').write_text(json.dumps({'seed': seed, 'kind': name}))
        (folder / 'env.json').write_text('{}')
        (folder / 'log.jsonl').write_text('\n'.join(map(json.dumps, curve(*losses))))
    done = run_program('compare.py', 'recovery', *sorted(tmp_path.glob('*/*')), '--baseline=*/dense/*')
    row = next(line for line in done.stdout.splitlines() if '/grown/' in line).split(' | ')
    assert row[1:6] == ['2.1000 ± 0.4243 (n=2)', '200', '150', '1.33', '1 of 2']
    assert '| 1.00 ± 0.00 (n=2) | 2 of 2 |' in done.stdout
    mistake = run_program('compare.py', 'recovery', tmp_path / 'grown/seed=1', '--baseline=*/dense/*', code=2)
    assert 'matches none' in mistake.stderr and mistake.stderr.startswith('compare.py recovery: ')


# ----------------------------------------------------------------------------------------------------
# the configs

SMALLER = ['--n_head=4', '--n_embd=64', '--block_size=16', '--batch_size=2', '--gradient_accumulation_steps=1',
           '--device=cpu', '--compile=False', '--dataset=tiny', '--max_iters=24', '--lr_decay_iters=24', '--warmup_iters=1',
           '--eval_interval=24', '--eval_iters=1', '--log_interval=1']


@pytest.mark.slow
@pytest.mark.parametrize('name, more', [
    ('gpt2_grow_lowrank', ['--n_layer=5', '--grow_every=5', '--linear=h.*.attn.c_v=lowrank(8); h.*.mlp.*=lowrank(20)']),
    ('grow_shakespeare_char', ['--grow_every=5', '--linear=h.*.attn.c_v=lowrank(8); h.*.mlp.*=lowrank(20)'])])
def test_configs_that_grow_train_when_made_small(name, more, data, tmp_path, run_program):
    run_program('train.py', f'config/{name}.py', *SMALLER, *more, f'--data_dir={data}', f'--out_dir={tmp_path}',
                timeout=300)
    state = checkpoint.load(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    changes = [line['change'] for line in lines if 'change' in line]
    assert len(changes) == {'gpt2_grow_lowrank': 3, 'grow_shakespeare_char': 4}[name] and 'dense' in changes[-1]
    assert state['built']['dense'] and all(2 < line['loss'] < 6 for line in lines if 'loss' in line)


def test_configs_that_grow_have_the_size_and_words_they_promise():
    config = configurator.load(['config/gpt2_grow_lowrank.py'])
    with torch.device('meta'):
        model = GPT(GPTConfig(**{**configurator.as_dict(configurator.model_config(config)), 'linear': {}}))
    assert model.num_params() == 124_373_760 and '124,373,760' in (ROOT / 'config/gpt2_grow_lowrank.py').read_text()
    assert config.batch_size * config.gradient_accumulation_steps * config.block_size == 491_520
    for name in ('gpt2_grow_lowrank', 'grow_shakespeare_char'):
        config, text = configurator.load([f'config/{name}.py']), (ROOT / f'config/{name}.py').read_text()
        assert 'torchrun --standalone --nproc_per_node=' in text and config.out_dir == f'out/{name}'
        last = (config.n_layer - config.grow_from) * config.grow_every
        assert last < config.finish_dense_at * config.max_iters             # all blocks are there before the dense finish


@pytest.mark.parametrize('more, words', [
    (['--grow_from=9', '--grow_every=1'], 'grow_from must not exceed n_layer (2), got 9'),
    (['--grow_from=1'], 'grow_from needs grow_every=STEPS or grow_on_plateau=True'),
    (['--finish_dense_at=1'], 'finish_dense_at must be below 1'),
    (['--n_layer=3', '--grow_from=2', '--grow_every=2', '--grow_init=copy', '--linear=h.2.mlp.c_fc=kron(8,8)'],
     "grow_init='copy' copies the block before")])
def test_mistakes_are_one_line(data, tmp_path, more, words, capsys):
    with pytest.raises((SystemExit, UserError)) as error:
        run(data, tmp_path, *more)
    assert words in str(error.value) + capsys.readouterr().err
