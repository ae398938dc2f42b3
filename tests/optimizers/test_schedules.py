"""optimizers/schedules.py: micro-steps and sequence lengths by stage; and what training makes of them."""
import json

import pytest
import torch

import configurator
import train
from checkpoints import checkpoint
from decomposition import initialise
from optimizers import schedules
from tests.tiny import arguments, make_data


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(data, out, *more, code=0):
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load([*arguments(data, out), *more]))
    return checkpoint.load(out)


def lines(out):
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


def same(a, b):
    return all(torch.equal(t, b['model'][name]) for name, t in a['model'].items())


def distance(a, b):
    return max((t - b['model'][name]).abs().max().item() for name, t in a['model'].items() if t.is_floating_point())


@pytest.mark.parametrize('rules, max_iters', [({}, 10), ({0: 0.25, 0.5: 1}, 10), ({0: 0.3, 0.34: 0.6, 0.9: 1}, 17),
                                              ({'0': '0.5', '0.5': '1'}, 7), ({0: 1e-3}, 3)])
@pytest.mark.parametrize('accumulation, world_size', [(8, 1), (8, 2), (1, 1)])
def test_rounds_add_up(rules, max_iters, accumulation, world_size):
    config = configurator.Config(batch_schedule=rules, max_iters=max_iters)
    rounds, before = schedules.Rounds(config, accumulation, world_size), 0
    for step in range(max_iters):
        share = schedules.share_at(step, config, 'batch_schedule')
        assert rounds.before(step) == before
        assert rounds.count(step) == max(1, round(accumulation // world_size * share))
        before += rounds.count(step)
    assert rounds.before(max_iters) == before


def test_a_stage_begins_with_its_fraction():
    config = configurator.Config(block_schedule={0: 0.25, 0.5: 0.5, 0.75: 1}, max_iters=8, block_size=64)
    assert [schedules.block_size(step, config) for step in range(9)] == [16, 16, 16, 16, 32, 32, 64, 64, 64]


@pytest.mark.parametrize('argument, words', [
    ('--batch_schedule=0.1=0.5', 'the first fraction 0'), ('--batch_schedule=0=2', 'batch_schedule takes'),
    ('--batch_schedule=0=x', 'batch_schedule takes'), ('--block_schedule=0=0.3', 'which do not divide block_size (1024)'),
    ('--block_schedule=0=0.5; 1=1', 'block_schedule takes'), ('--cooldown=0', 'cooldown must be above 0'),
    ('--ema_decay=1', 'ema_decay must be below 1'), ('--lr_schedule=line', 'lr_schedule must be one of cosine, wsd'),
    ('--muon_momentum=1', 'muon_momentum must be below 1'), ('--optimizer=moun', "did you mean 'muon'")])
def test_refusals(argument, words):
    with pytest.raises(configurator.UserError) as error:
        configurator.load([argument])
    assert words in str(error.value)


def test_schedules_train_count_their_tokens_and_resume_to_the_same_bits(data, tmp_path):
    more = ['--batch_schedule=0=0.5; 0.5=1', '--block_schedule=0=0.25; 0.3=1', '--lr_schedule=wsd', '--log_interval=1']
    whole = run(data, tmp_path / 'a', *more)
    assert whole['tokens'] == (6 * 1 + 6 * 2) * 4 * 16
    tokens = [line['tokens'] for line in lines(tmp_path / 'a') if 'loss' in line]
    assert [b - a for a, b in zip(tokens, tokens[1:])] == [64] * 5 + [128] * 6
    run(data, tmp_path / 'b', *more, '--save_interval=1')
    for file in [f for f in (tmp_path / 'b').glob('ckpt_*') if '00010' not in f.name]:
        file.unlink()
    assert same(whole, run(data, tmp_path / 'b', '--init_from=resume'))


def test_shorter_sequences_hold_the_same_tokens(data, tmp_path):
    """A model that looks back no further than itself cannot tell."""
    more = ['--attention=window(1)', '--rope=True', '--dropout=0']
    assert distance(run(data, tmp_path / 'a', *more), run(data, tmp_path / 'b', *more, '--block_schedule=0=0.25')) < 2e-3
    more = ['--rope=True', '--dropout=0']
    assert distance(run(data, tmp_path / 'c', *more), run(data, tmp_path / 'd', *more, '--block_schedule=0=0.25')) > 1e-2


@pytest.mark.parametrize('more', [['--optimizer=muon'], ['--optimizer=muon', '--orthograd=True', '--muon_cautious=True',
                                                         '--muon_weight_decay=0.1', '--muon_adjust_lr=match_rms'],
                                  ['--optimizer=muon', '--muon_product=spectron', '--look_ahead=0.6', '--look_ahead_from=2'],
                                  ['--optimizer=muon', '--muon_row_beta=0.9', '--muon_coefficients=convergent',
                                   '--muon_steps=12', '--vector_lr=0.02', '--embedding_lr=0.1', '--embed_norm=True'],
                                  ['--ema_decay=0.9'], ['--skip_zscore=3'], ['--prefetch=3'],
                                  ['--optimizer=muon', '--weights=bfloat16', '--ema_decay=0.5']], ids=str)
def test_resume_is_bit_exact_with(data, tmp_path, more):
    whole = run(data, tmp_path / 'a', *more)
    run(data, tmp_path / 'b', *more, '--max_iters=7')
    again = run(data, tmp_path / 'b', *more, '--init_from=resume')
    assert same(whole, again) and whole['outliers'] == again['outliers']
    for kind in ('average', 'ahead'):
        assert all(torch.equal(t, again[kind][name]) for name, t in whole.get(kind, {}).items())
    assert ('ahead' in whole) == ('--look_ahead=0.6' in more)
    for name, entries in whole['optimizer'].items():
        assert all(torch.equal(value, again['optimizer'][name][key]) for key, value in entries.items())


def test_muon_takes_the_matrices_and_factors_only(data, tmp_path):
    state = run(data, tmp_path, '--optimizer=muon')
    kinds = {name: 'momentum' in entries for name, entries in state['optimizer'].items()}
    assert kinds['transformer.h.0.mlp.c_fc.A'] and kinds['transformer.h.0.attn.c_q.weight']
    assert not kinds['transformer.wte.weight'] and not kinds['transformer.ln_f.weight']
    rates = [line['lr'] for line in lines(tmp_path) if 'loss' in line]
    assert max(rates) < 1.1e-2                                          # the log has AdamW's


def test_with_prefetch_nothing_changes(data, tmp_path):
    assert same(run(data, tmp_path / 'a'), run(data, tmp_path / 'b', '--prefetch=3'))


def test_the_average_is_what_is_evaluated(data, tmp_path):
    state = run(data, tmp_path / 'a', '--ema_decay=0.9', '--eval_iters=0')
    plain = run(data, tmp_path / 'b', '--eval_iters=0')
    assert same(state, plain)                                            # the weights themselves do not care
    assert lines(tmp_path / 'a')[-1]['val_loss'] != lines(tmp_path / 'b')[-1]['val_loss']
    _, sampled, _ = initialise.read_folder(str(tmp_path / 'a'))              # what sample.py and evaluate.py take
    assert torch.equal(sampled['transformer.wte.weight'], state['average']['transformer.wte.weight'])
    assert torch.equal(sampled['lm_head.weight'], state['average']['transformer.wte.weight'])
    name, decay, average = 'transformer.h.0.ln_1.weight', 0.9, None
    run(data, tmp_path / 'c', '--save_interval=1', '--keep_checkpoints=20')
    for step in range(1, 13):
        w = checkpoint.load(tmp_path / 'c' / f'ckpt_{step:08d}.pt')['model'][name]
        d = min(decay, step / (9 + step))
        average = d * (torch.ones_like(w) if average is None else average) + (1 - d) * w
    assert (state['average'][name] - average).abs().max() < 1e-6


def test_a_target_stops_the_run_and_is_said(data, tmp_path, capsys):
    state = run(data, tmp_path, '--target_val_loss=99', '--eval_interval=4')
    assert state['step'] == 0
    state = run(data, tmp_path, '--target_val_loss=2.8', '--eval_interval=1')
    assert 0 < state['step'] < 12 and state['seconds'] > 0
    record = json.loads((tmp_path / 'target.json').read_text())
    assert record['val_loss'] <= 2.8 == record['target_val_loss'] and record['step'] == state['step']
    assert record['tokens'] == state['tokens'] and record['training_seconds'] > 0 and record['torch']
    assert f'target_val_loss 2.8 reached at step {state["step"]}: {state["tokens"]:,} tokens' in capsys.readouterr().out


def test_outliers_are_those_of_the_formula():
    from optimizers.optim import Outliers
    torch.manual_seed(0)
    found, past = Outliers(3.0, window=16), []
    for step in range(100):
        value = torch.randn(()).item() + (50 if step in (5, 40, 77) else 0)
        far = len(past) == 16 and (value - torch.tensor(past).mean()) / torch.tensor(past).std(correction=0) > 3
        assert found.check(loss=value, grad_norm=1.0) == bool(far)
        past = past if far else [*past, value][-16:]
    assert not Outliers(0.0).check(loss=1e9, grad_norm=1e9)


def test_a_spike_is_skipped_and_training_goes_on(data, tmp_path, monkeypatch):
    from optimizers.optim import Outliers
    real = Outliers.__init__
    monkeypatch.setattr(Outliers, '__init__', lambda self, limit: real(self, limit, window=4))
    state = run(data, tmp_path, '--skip_zscore=1e-9', '--log_interval=1')       # everything above the mean is far
    skipped = [line['step'] for line in lines(tmp_path) if line.get('skipped')]
    assert state['step'] == 12 and skipped and min(skipped) >= 4


def test_a_memory_budget_lowers_the_batch_and_keeps_the_step(data, tmp_path, capsys):
    whole = run(data, tmp_path / 'a', '--dropout=0')
    estimate = 'GiB'
    train.main(configurator.load([*arguments(data, tmp_path / 'x'), '--dry_run=True']))
    assert estimate in capsys.readouterr().out
    less = run(data, tmp_path / 'b', '--dropout=0', '--memory_budget_gb=0.0004')
    assert less['config']['batch_size'] < 4 and less['config']['batch_size'] * less['config'][
        'gradient_accumulation_steps'] == 8 and less['tokens'] == whole['tokens']
    assert distance(whole, less) < 1e-4
    with pytest.raises(SystemExit) as leave:
        run(data, tmp_path / 'c', '--memory_budget_gb=0.0001')
    assert leave.value.code == 2 and 'is below the' in capsys.readouterr().err


def test_checkpoints_from_before_these_entries_resume(data, tmp_path):
    whole = run(data, tmp_path / 'a')
    run(data, tmp_path / 'b', '--max_iters=7')
    state = checkpoint.load(tmp_path / 'b')
    for name in ('average', 'outliers', 'seconds', 'built'):
        del state[name]
    for name in [name for name in state['config'] if name.startswith(('grow', 'muon', 'finish', 'batch_s', 'block_s'))]:
        del state['config'][name]
    checkpoint.save(tmp_path / 'b', state)
    assert same(whole, run(data, tmp_path / 'b', '--init_from=resume'))
