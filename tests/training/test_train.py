"""Training in one process: what a run writes, determinism, resume bit for bit, and refusals."""
import json
import math
import os

import pytest
import torch

import configurator
import train
from checkpoints import checkpoint
from decomposition import initialise
from optimizers import optim
from tests.tiny import ROOT, arguments, make_data


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(autouse=True)
def no_signal():
    train.STOP.update(signal=None, time=0.0)
    torch.manual_seed(99)           # a run must not depend on what came before it in this process


def run(data, out, *more, code=None):
    """train.main in this process -> the newest checkpoint's state; with code, its exit code instead."""
    config = configurator.load(arguments(data, out, *more))
    if code is None:
        train.main(config)
        return checkpoint.load(out)
    with pytest.raises(SystemExit) as leave:
        train.main(config)
    assert leave.value.code == code
    return leave.value.code


def log(out, key='loss'):
    lines = [json.loads(line) for line in open(os.path.join(out, 'log.jsonl'))]
    return [(line['step'], line[key]) for line in lines if key in line]


def same(a, b):
    """Whether two checkpoints hold the same bits of weights and optimizer state."""
    weights = a['model'].keys() == b['model'].keys() and all(torch.equal(t, b['model'][n]) for n, t in a['model'].items())
    states = a['optimizer'].keys() == b['optimizer'].keys() and all(
        torch.equal(t, b['optimizer'][n][k]) for n, entries in a['optimizer'].items() for k, t in entries.items())
    return weights and states and a['step'] == b['step']


def test_a_run_learns_and_writes_what_it_should(data, tmp_path, capsys):
    state = run(data, tmp_path, '--max_iters=60', '--lr_decay_iters=60')
    losses = [loss for _, loss in log(tmp_path)]
    assert len(losses) == 60 and losses[0] > 2.7 and losses[-1] < 2.4
    assert set(os.listdir(tmp_path)) >= {'config.json', 'env.json', 'log.jsonl', 'loss.png', 'best.json'}
    line = json.loads(open(tmp_path / 'log.jsonl').readlines()[2])
    assert {'step', 'loss', 'lr', 'grad_norm', 'tokens', 'ms', 'tokens_per_s', 'mfu', 'peak_memory'} <= set(line)
    assert [s for s, _ in log(tmp_path, 'val_loss')] == list(range(0, 61, 6))
    assert state['step'] == 60 and state['tokens'] == 60 * 2 * 4 * 16
    assert json.load(open(tmp_path / 'config.json'))['n_embd'] == 32
    assert {'torch', 'command', 'commit', 'device'} <= set(json.load(open(tmp_path / 'env.json')))
    assert checkpoint.best(tmp_path)['val_loss'] == min(v for _, v in log(tmp_path, 'val_loss')[1:])
    assert 'tokens per step' in capsys.readouterr().out


def test_logged_loss_is_the_mean_over_micro_steps(data, tmp_path):
    """nanoGPT logs the last micro-step's; without dropout ours equals one large batch's."""
    run(data, tmp_path / 'a', '--max_iters=3', '--dropout=0')
    run(data, tmp_path / 'b', '--max_iters=3', '--dropout=0', '--gradient_accumulation_steps=1', '--batch_size=8')
    assert [v for _, v in log(tmp_path / 'a')] == pytest.approx([v for _, v in log(tmp_path / 'b')], rel=1e-5)


@pytest.mark.parametrize('more', [['--eval_interval=4'], ['--log_interval=5'], ['--eval_iters=0'],
                                  ['--save_interval=1'], ['--always_save_checkpoint=False']])
def test_evaluation_logging_and_saving_do_not_change_training(data, tmp_path, more):
    assert same(run(data, tmp_path / 'a'), run(data, tmp_path / 'b', *more))


def test_another_seed_changes_it(data, tmp_path):                       # negative control of the test above
    assert not same(run(data, tmp_path / 'a'), run(data, tmp_path / 'b', '--seed=1'))


@pytest.mark.parametrize('stop', [1, 5, 6, 7, 11])
def test_resume_is_bit_exact(data, tmp_path, stop):
    whole = run(data, tmp_path / 'a')
    run(data, tmp_path / 'b', f'--max_iters={stop}')
    again = run(data, tmp_path / 'b', '--init_from=resume')
    assert same(whole, again)
    assert log(tmp_path / 'a') == log(tmp_path / 'b')
    assert dict(log(tmp_path / 'a', 'val_loss')).items() <= dict(log(tmp_path / 'b', 'val_loss')).items()
    assert again['best_val_loss'] <= whole['best_val_loss']


def test_resume_needs_no_config(data, tmp_path):
    """Settings that are not given come from the checkpoint."""
    whole = run(data, tmp_path / 'a')
    run(data, tmp_path / 'b', '--max_iters=7')
    train.main(configurator.load([f'--out_dir={tmp_path / "b"}', '--init_from=resume', '--max_iters=12']))
    assert same(whole, checkpoint.load(tmp_path / 'b'))


def mutate(out, change):
    """Rewrite the newest checkpoint with `change(state)` applied."""
    state = checkpoint.load(out)
    change(state)
    checkpoint.save(out, state)


def test_randomness_follows_from_seed_step_and_micro_step():
    def drawn(seed, step, micro_step):
        train.seed_for(configurator.load([f'--seed={seed}']), step, micro_step)
        return torch.rand(4).tolist()
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 11, 1), (0, 1, 11)]
    assert len({tuple(drawn(*place)) for place in places}) == len(places)
    assert drawn(0, 5, 3) == drawn(0, 5, 3)


MUTANTS = {
    'the step is off by one': lambda s: s.update(step=s['step'] + 1),
    'another seed': lambda s: s['config'].update(seed=s['config']['seed'] + 1),
    'the optimizer is dropped': lambda s: s.update(optimizer={}),
    'one moment is dropped': lambda s: s['optimizer'].pop('transformer.h.0.mlp.c_fc.A'),
    'two moments are swapped, as positions would': lambda s: s['optimizer'].update({
        'transformer.h.0.attn.c_q.weight': s['optimizer']['transformer.h.0.attn.c_k.weight'],
        'transformer.h.0.attn.c_k.weight': s['optimizer']['transformer.h.0.attn.c_q.weight']}),
}


@pytest.mark.parametrize('name', MUTANTS)
def test_r4_a_checkpoint_that_lost_something_is_noticed(data, tmp_path, name):
    whole = run(data, tmp_path / 'a')
    run(data, tmp_path / 'b', '--max_iters=7')
    mutate(tmp_path / 'b', MUTANTS[name])
    train.main(configurator.load([f'--out_dir={tmp_path / "b"}', '--init_from=resume', '--max_iters=12']))
    assert not same(whole, checkpoint.load(tmp_path / 'b'))


def test_fp16_scaler_is_restored(data, tmp_path):
    more = ['--dtype=float16', '--max_iters=6']
    whole = run(data, tmp_path / 'a', *more)
    run(data, tmp_path / 'b', '--dtype=float16', '--max_iters=3')
    assert same(whole, run(data, tmp_path / 'b', *more, '--init_from=resume')) and whole['scaler']['scale'] > 1
    run(data, tmp_path / 'c', '--dtype=float16', '--max_iters=3')
    mutate(tmp_path / 'c', lambda s: s['scaler'].update(_growth_tracker=0, scale=2.0 ** -20))
    assert not same(whole, run(data, tmp_path / 'c', *more, '--init_from=resume'))


def test_bfloat16_trains(data, tmp_path):
    run(data, tmp_path, '--dtype=bfloat16', '--max_iters=30', '--lr_decay_iters=30')
    assert log(tmp_path)[-1][1] < log(tmp_path)[0][1] - 0.2


def test_best_is_not_overwritten_by_worse(data, tmp_path):
    """nanoGPT forgets its best loss when always_save_checkpoint is on."""
    run(data, tmp_path, '--max_iters=12', '--keep_checkpoints=2', '--eval_interval=2')
    best = min(v for s, v in log(tmp_path, 'val_loss') if s > 0)
    assert checkpoint.best(tmp_path)['val_loss'] == checkpoint.load(tmp_path)['best_val_loss'] == best
    assert checkpoint.load(tmp_path, 'best')['step'] == checkpoint.best(tmp_path)['step']


def test_only_better_checkpoints_when_asked(data, tmp_path):
    run(data, tmp_path, '--always_save_checkpoint=False', '--learning_rate=0', '--min_lr=0')
    assert checkpoint.steps(tmp_path) == [12]               # the last one always; step 6 was no better than step 0


def test_a_fresh_run_sets_the_old_one_aside(data, tmp_path):
    first = run(data, tmp_path)
    run(data, tmp_path, '--max_iters=3')
    assert checkpoint.load(tmp_path)['step'] == 3
    assert same(first, checkpoint.load(tmp_path / 'previous'))
    assert [s for s, _ in log(tmp_path)] == [0, 1, 2]


def test_init_from_a_dense_checkpoint_decomposes(data, tmp_path, capsys):
    run(data, tmp_path / 'dense', '--linear=*=dense', '--max_iters=40')
    dense = checkpoint.load(tmp_path / 'dense')
    start = run(data, tmp_path / 'kron', f'--init_from={tmp_path / "dense"}', '--max_iters=0')
    assert 'h.0.mlp.c_fc: kron(8, 8, terms=2), relative error' in capsys.readouterr().out
    assert torch.equal(start['model']['transformer.wte.weight'], dense['model']['transformer.wte.weight'])
    assert start['model']['transformer.h.0.mlp.c_fc.A'].shape == (2, 8, 8)
    more = run(data, tmp_path / 'kron', f'--init_from={tmp_path / "dense"}', '--max_iters=6')
    assert more['step'] == 6


@pytest.mark.parametrize('more', [
    ['--rope=True', '--norm=rmsnorm', '--mlp=swiglu(64)', '--attention=mla(8, qk_rope_head_dim=4)',
     '--linear=*.mlp.c_fc=lowrank(4)'],
    ['--rope=True', '--attention=window(4)', '--value_residual=True'],
    ['--rope=True', '--ngpt=full', '--linear=h.*.mlp.*=kron(8, 8)', '--tie_weights=False', '--bias=False'],
    ['--attention=dint(version=1)', '--n_head=4', '--qk_norm=split', '--n_kv_head=2']])
def test_models_of_every_kind_are_read_back_continued_and_sampled(data, tmp_path, more):
    first = run(data, tmp_path / 'a', *more)
    config, state, info = initialise.read_folder(str(tmp_path / 'a'))
    model = initialise.build(config, config, state).eval()
    assert all(torch.equal(t, first['model'][name]) for name, t in model.state_dict().items())
    idx = torch.zeros(1, 1, dtype=torch.long)
    assert torch.equal(model.generate(idx, 20, temperature=0), model.generate(idx, 20, temperature=0, use_cache=False))
    again = run(data, tmp_path / 'b', f'--init_from={tmp_path / "a"}', '--max_iters=0', *more)
    assert all(torch.equal(t, first['model'][name]) for name, t in again['model'].items())


def test_dense_weights_start_a_model_with_another_attention(data, tmp_path):
    run(data, tmp_path / 'a', '--linear=*=dense', '--max_iters=3')
    state = run(data, tmp_path / 'b', f'--init_from={tmp_path / "a"}', '--linear=*=dense', '--max_iters=0',
                '--attention=window(4)')
    assert state['model']['transformer.h.0.attn.window'] == 4


def test_eval_only_speaks_at_a_step_that_was_evaluated_before(data, tmp_path, capsys):
    run(data, tmp_path, '--max_iters=6')
    capsys.readouterr()
    train.main(configurator.load([f'--out_dir={tmp_path}', '--init_from=resume', '--eval_only=True', f'--data_dir={data}']))
    assert 'step 6: train loss' in capsys.readouterr().out


def test_eval_only_writes_nothing(data, tmp_path, capsys):
    train.main(configurator.load(arguments(data, tmp_path / 'x', '--eval_only=True')))
    assert 'val loss' in capsys.readouterr().out and not (tmp_path / 'x').exists()


@pytest.mark.parametrize('more, words', [
    (['--linear=h.7.*=dense'], "--linear=h.7.*=dense: linear: the pattern 'h.7.*' wins at no site"),
    (['--linear=*.c_fc=kron(5,8)'], 'linear: h.0.mlp.c_fc: kron(5, 8): factors of 5 x 8 do not divide'),
    (['--init_from=resume'], 'has no checkpoint'),
    (['--init_from=/nowhere/at/all'], "there is no folder '/nowhere/at/all'"),
    (['--dataset=nothing'], 'nothing'),
    (['--block_size=100000'], 'block_size'),
    (['--device=cuda:77'], 'not on this machine')])
def test_mistakes_found_after_torch_are_one_line_and_leave_2(data, tmp_path, more, words, capsys):
    run(data, tmp_path, *more, code=2)
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1 and err.startswith('train.py: ')
    assert not os.path.exists(tmp_path / 'log.jsonl')


@pytest.mark.parametrize('rules', ["dint(version='published')", "h.1=dint(version='visible'); h.0=causal"])
def test_attention_that_sees_the_future_is_refused_without_allow_leak(data, tmp_path, rules, capsys):
    run(data, tmp_path, f'--attention={rules}', code=2)
    err = capsys.readouterr().err
    block = 0 if rules.startswith('dint') else 1
    assert f'block {block} sees the future' in err and '--allow_leak=True' in err and err.count('\n') == 1
    assert '--attention=' in err and not os.path.exists(tmp_path / 'log.jsonl')
    run(data, tmp_path, f'--attention={rules}', '--dry_run=True', code=2)
    run(data, tmp_path, f'--attention={rules}', '--allow_leak=True', '--max_iters=2')
    assert run(data, tmp_path, '--init_from=resume', '--max_iters=3')['step'] == 3          # allowed once, allowed on
    run(data, tmp_path / 'causal', '--attention=dint', '--max_iters=2')


def test_resume_refuses_another_shape_and_other_data(data, tmp_path, capsys):
    run(data, tmp_path / 'a', '--max_iters=2')
    run(data, tmp_path / 'a', '--init_from=resume', '--n_layer=3', code=2)
    assert 'n_layer is 2 in the checkpoint' in capsys.readouterr().err
    other = make_data(tmp_path / 'other')
    bins = other / 'tiny' / 'train.bin'
    os.rename(bins, other / 'tiny' / 'x')
    os.rename(other / 'tiny' / 'val.bin', bins)
    run(other, tmp_path / 'a', '--init_from=resume', code=2)
    assert capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('rate, policy', [('1e15', 'stop'), ('1e15', 'skip')])
def test_r10_a_loss_that_is_not_finite_stops_with_3_and_saves_nothing_bad(data, tmp_path, rate, policy, capsys):
    run(data, tmp_path, f'--learning_rate={rate}', '--grad_clip=0', f'--nonfinite={policy}', '--save_interval=1',
        '--dropout=0', code=3)
    assert 'is not finite; lower learning_rate' in capsys.readouterr().out
    if checkpoint.steps(tmp_path):
        assert all(t.isfinite().all() for t in checkpoint.load(tmp_path)['model'].values())


def test_r10_a_single_bad_step_is_skipped(data, tmp_path, monkeypatch):
    """policy skip: the update of a poisoned step is not applied and training goes on."""
    real, calls = train.train_step, []

    def poisoned(run, *rest):
        calls.append(1)
        model = run.model
        if len(calls) == 4:
            hook = next(model.parameters()).register_hook(lambda g: g * math.inf)
            before = [p.clone() for p in model.parameters()]
            result = real(run, *rest)
            hook.remove()
            assert not result['applied'] and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
            return result
        return real(run, *rest)
    monkeypatch.setattr(train, 'train_step', poisoned)
    state = run(data, tmp_path, '--nonfinite=skip')
    assert state['step'] == 12 and all(t.isfinite().all() for t in state['model'].values())


@pytest.mark.parametrize('where', ['forward', 'backward', 'save'])
def test_r13_out_of_memory_is_one_line_and_leaves_4(data, tmp_path, monkeypatch, capsys, where):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory')
    if where == 'forward':
        monkeypatch.setattr(train, 'train_step', full)
    elif where == 'backward':
        monkeypatch.setattr(torch.Tensor, 'backward', full)
    else:
        monkeypatch.setattr(optim, 'state_by_name', full)
    run(data, tmp_path, code=4)
    err = capsys.readouterr().err
    assert 'lower batch_size (4) or block_size (16)' in err and err.count('\n') == 1


def test_r12_a_failed_save_warns_and_only_the_last_is_fatal(data, tmp_path, monkeypatch, capsys):
    real = checkpoint.save

    def full(folder, state, **kwargs):
        if state['step'] == 6:
            raise OSError(28, 'No space left on device')
        return real(folder, state, **kwargs)
    monkeypatch.setattr(checkpoint, 'save', full)
    assert run(data, tmp_path)['step'] == 12
    assert 'step 6 was not saved' in capsys.readouterr().err

    def always(folder, state, **kwargs):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpoint, 'save', always)
    run(data, tmp_path / 'b', code=4)


@pytest.mark.parametrize('sequences, accumulation, ranks, expected', [
    (12, 40, 8, (12, 40)), (12, 1, 2, (6, 2)), (8, 1, 4, (2, 4)), (12, 3, 2, (9, 4)), (3, 2, 4, None), (4, 6, 4, (3, 8))])
def test_split_batch_keeps_the_tokens_of_a_step(sequences, accumulation, ranks, expected):
    config = configurator.load([f'--batch_size={sequences}', f'--gradient_accumulation_steps={accumulation}'])
    if expected is None:
        with pytest.raises(train.UserError, match='do not divide over 4 ranks'):
            train.split_batch(config, ranks)
    else:
        assert train.split_batch(config, ranks) == expected
        assert expected[0] * expected[1] == sequences * accumulation


def test_dry_run_prints_the_table_and_stops(data, tmp_path, capsys):
    train.main(configurator.load(arguments(data, tmp_path / 'x', '--dry_run=True')))
    out = capsys.readouterr().out
    assert 'h.1.attn.c_v' in out and 'lowrank(4)' in out and 'without the position table' in out and 'GiB' in out
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('path', sorted(str(p) for p in (ROOT / 'config').rglob('*.py')
                                        if p.parent.name not in ('ablation', 'compression')))
def test_every_config_of_ours_builds(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    if 'out/' not in str(configurator.load([path]).init_from):                      # which starts from a run
        train.main(configurator.load([path, '--dry_run=True', '--device=cpu']))
        assert 'without embeddings' in capsys.readouterr().out


@pytest.mark.parametrize('vocab_size, total', [(50257, '81,972,576 in all'), (None, '82,008,672 in all')])
def test_dry_run_of_the_124m_config_prints_its_parameters(vocab_size, total, capsys):
    more = [f'--vocab_size={vocab_size}'] if vocab_size else []
    train.main(configurator.load(['config/gpt2_kron_mlp.py', '--dry_run=True', '--device=cpu', *more]))
    assert total in capsys.readouterr().out


def test_debug_shows_the_traceback(data, tmp_path):
    with pytest.raises(train.UserError):
        train.main(configurator.load(arguments(data, tmp_path, '--debug=True', '--linear=h.7.*=dense')))


def test_wandb_and_tensorboard_that_are_missing_warn_once(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'wandb', None)
    monkeypatch.setitem(__import__('sys').modules, 'torch.utils.tensorboard', None)
    run(data, tmp_path, '--wandb_log=True', '--tensorboard_log=True', '--max_iters=3')
    err = capsys.readouterr().err
    assert err.count('wandb is not installed') == 1 and err.count('tensorboard is not installed') == 1


def test_forty_micro_steps_unasked_are_said(data, tmp_path, capsys):
    some = [a for a in arguments(data, tmp_path, '--max_iters=0') if 'accumulation' not in a]
    train.main(configurator.load(some))
    assert "nanoGPT's default 40" in capsys.readouterr().out
    run(data, tmp_path / 'b', '--gradient_accumulation_steps=40', '--max_iters=0')
    assert "nanoGPT's default 40" not in capsys.readouterr().out


@pytest.mark.slow
def test_compile_trains_to_the_same_losses(data, tmp_path):
    run(data, tmp_path / 'a', '--dropout=0', '--max_iters=5')
    run(data, tmp_path / 'b', '--dropout=0', '--max_iters=5', '--compile=True')
    assert [v for _, v in log(tmp_path / 'b')] == pytest.approx([v for _, v in log(tmp_path / 'a')], rel=1e-4)
